"""Attention backward. With p = softmax(logits), m the choices of dropout over (1 - rate), and delta = sum(dout out):

    dV = (p m)^T dout,    dlogits = p (m dout V^T - delta),    dbias = dlogits summed to its shape
    dQ = scale (cap' dlogits) K,    dK = scale (cap' dlogits)^T Q

p is made again from forward's statistics, and m from its counters. Three kernels, none of which adds into memory that
another program writes: gradients are the same bits from run to run.

    query_gradient     a program to a tile of queries, over the keys they see; also leaves delta, a float a query
    key_gradients      a program to a tile of keys, over the queries that see them and the heads that share them
    bias_gradient      only if asked for; a program to a tile of the bias, over whatever that tile is broadcast to

Shapes, alignment and grids are forward's. dQ, dK and dV lie in memory as [B, S, H, D], each for itself or side by side
in one tensor of all heads (grad_row: from token to token). Each kernel reads its own tile once; the first two make the
scores and dout V^T twice in all, seven products where one pass with atomic additions would need five.
"""

import triton
import triton.language as tl

from .attention_scores import (
    INFINITY,
    LOG2E,
    first_token,
    kept,
    keys_seen,
    load_rows,
    locate,
    logits_and_slope,
    present_keys,
    store_rows,
    visible,
)


@triton.jit
def query_gradient(
    query, key, value, bias, alibi, key_lengths, boundaries_q, boundaries_k, seed, out, grad_out, stats, delta,
    grad_query,
    heads, group, queries, keys, dim, sequences,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    bias_batch, bias_head, bias_row, bias_key, alibi_batch, stats_batch,
    scale, softcap, left, right, threshold, keep_scale, grad_row,
    BIAS: tl.constexpr, ALIBI: tl.constexpr, LENGTHS: tl.constexpr, PACKED: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MODIFIED: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sequence, tile, query_first, own, key_first, others = locate(
        tl.program_id(0), boundaries_q, boundaries_k, sequences, queries, keys, RIGHT, PACKED, QUERIES
    )
    if tile * QUERIES >= own:
        return
    head = tl.program_id(1)
    batch = sequence.to(tl.int64)
    wide_head = head.to(tl.int64)
    query += batch * query_batch + wide_head * query_head + query_first.to(tl.int64) * query_row
    key += batch * key_batch + (wide_head // group) * key_head + key_first.to(tl.int64) * key_row
    value += batch * value_batch + (wide_head // group) * value_head + key_first.to(tl.int64) * value_row
    bias += batch * bias_batch + wide_head * bias_head
    slope = 0.0
    if ALIBI:
        slope = tl.load(alibi + batch * alibi_batch + head)
    if DROPOUT:
        seed_value = tl.load(seed)
    present = present_keys(key_lengths, sequence, others, LENGTHS)
    factor = 1.0
    if not MODIFIED:
        factor = scale * LOG2E

    row = tile * QUERIES + tl.arange(0, QUERIES)
    column = tl.arange(0, DIM)
    shift = others - own
    position = (row + shift)[:, None]
    token = first_token(batch, own, query_first, PACKED)
    out += (token * heads + head) * dim
    grad_out += (token * heads + head) * dim
    grad_query += token * grad_row + wide_head * dim
    q = load_rows(query, tile * QUERIES, query_row, column, own, dim, True, EVEN, QUERIES)
    grad = load_rows(grad_out, tile * QUERIES, heads * dim, column, own, dim, True, EVEN, QUERIES)
    result = load_rows(out, tile * QUERIES, heads * dim, column, own, dim, True, EVEN, QUERIES)
    row_delta = tl.sum(grad.to(tl.float32) * result.to(tl.float32), axis=1)
    stat = batch * stats_batch + wide_head * queries + query_first + row
    tl.store(delta + stat, row_delta, mask=row < own)
    lse = tl.load(stats + 2 * stat, mask=row < own, other=INFINITY)
    acc = tl.zeros((QUERIES, DIM), tl.float32)

    first = tile * QUERIES + shift
    last = tl.minimum(tile * QUERIES + QUERIES, own) - 1 + shift
    begin, seen_by_all, end = keys_seen(first, last, present, left, right, LEFT, RIGHT, KEYS)
    for masked in tl.static_range(2):
        from_key = begin if masked == 0 else seen_by_all
        to_key = seen_by_all if masked == 0 else end
        for start in range(from_key, to_key, KEYS):
            k_row = start + tl.arange(0, KEYS)
            k = load_rows(key, start, key_row, column, present, dim, masked == 1, EVEN, KEYS)
            v = load_rows(value, start, value_row, column, present, dim, masked == 1, EVEN, KEYS)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            inside = (row[:, None] < own) & (k_row[None, :] < present)
            scores, derivative = logits_and_slope(
                scores, position, k_row[None, :], bias, slope, inside, scale, softcap, bias_row, bias_key, row[:, None],
                MODIFIED, SOFTCAP, BIAS, ALIBI,
            )  # fmt: skip
            if masked == 1:
                seen = visible(position, k_row[None, :], present, left, right, LEFT, RIGHT)
                scores = tl.where(seen, scores, -INFINITY)
            weights = tl.exp2(scores * factor - lse[:, None])
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            if DROPOUT:
                keep = kept(seed_value, sequence * heads + head, row, start, threshold, QUERIES, KEYS)
                grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
            grad_scores = weights * (grad_weights - row_delta[:, None])
            if SOFTCAP:
                grad_scores *= derivative
            acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision=PRECISION)
    store_rows(grad_query, acc * scale, tile * QUERIES, grad_row, column, own, dim, QUERIES)


@triton.jit
def key_gradients(
    query, key, value, bias, alibi, key_lengths, boundaries_q, boundaries_k, seed, grad_out, stats, delta,
    grad_key, grad_value,
    heads, group, queries, keys, dim, sequences,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    bias_batch, bias_head, bias_row, bias_key, alibi_batch, stats_batch,
    scale, softcap, left, right, threshold, keep_scale, grad_row,
    BIAS: tl.constexpr, ALIBI: tl.constexpr, LENGTHS: tl.constexpr, PACKED: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MODIFIED: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Tiles are [keys, queries] here, so that the weights are the left operand of dV's product as they are."""
    sequence, tile, key_first, own, query_first, others = locate(
        tl.program_id(0), boundaries_k, boundaries_q, sequences, keys, queries, False, PACKED, KEYS
    )
    if tile * KEYS >= own:
        return
    key_head_index = tl.program_id(1)
    batch = sequence.to(tl.int64)
    key += batch * key_batch + key_head_index.to(tl.int64) * key_head + key_first.to(tl.int64) * key_row
    value += batch * value_batch + key_head_index.to(tl.int64) * value_head + key_first.to(tl.int64) * value_row
    query += batch * query_batch + query_first.to(tl.int64) * query_row
    if DROPOUT:
        seed_value = tl.load(seed)
    present = present_keys(key_lengths, sequence, own, LENGTHS)
    factor = 1.0
    if not MODIFIED:
        factor = scale * LOG2E

    start = tile * KEYS
    k_row = start + tl.arange(0, KEYS)
    column = tl.arange(0, DIM)
    shift = own - others
    k = load_rows(key, start, key_row, column, present, dim, True, EVEN, KEYS)
    v = load_rows(value, start, value_row, column, present, dim, True, EVEN, KEYS)
    acc_key = tl.zeros((KEYS, DIM), tl.float32)
    acc_value = tl.zeros((KEYS, DIM), tl.float32)

    # Queries [begin, middle) need masks; those of [middle, end) see every key of the tile.
    begin, end = 0, others
    middle = others
    if RIGHT:
        begin = tl.maximum(0, start - right - shift) // QUERIES * QUERIES
        middle = tl.maximum(begin, tl.cdiv(tl.maximum(0, start + KEYS - 1 - right - shift), QUERIES) * QUERIES)
    else:
        middle = tl.cast(0, tl.int32)
    if LEFT:
        end = tl.minimum(end, tl.maximum(0, start + KEYS + left - shift))
        middle = others
    middle = tl.where(start + KEYS <= present, tl.minimum(middle, end), end)
    end = tl.where(start < present, end, 0)
    for member in range(0, group):
        head = key_head_index * group + member
        wide_head = head.to(tl.int64)
        slope = 0.0
        if ALIBI:
            slope = tl.load(alibi + batch * alibi_batch + head)
        stats_first = batch * stats_batch + wide_head * queries + query_first
        q_base = query + wide_head * query_head
        grad_base = grad_out + (first_token(batch, others, query_first, PACKED) * heads + head) * dim
        for unmasked in tl.static_range(2):
            from_query = begin if unmasked == 0 else middle
            to_query = tl.minimum(middle, end) if unmasked == 0 else end
            for first in range(from_query, to_query, QUERIES):
                row = first + tl.arange(0, QUERIES)
                q = load_rows(q_base, first, query_row, column, others, dim, True, EVEN, QUERIES)
                grad = load_rows(grad_base, first, heads * dim, column, others, dim, True, EVEN, QUERIES)
                lse = tl.load(stats + 2 * (stats_first + row), mask=row < others, other=INFINITY)
                row_delta = tl.load(delta + stats_first + row, mask=row < others, other=0.0)
                scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
                position = (row + shift)[None, :]
                inside = (row[None, :] < others) & (k_row[:, None] < present)
                scores, derivative = logits_and_slope(
                    scores, position, k_row[:, None], bias + batch * bias_batch + wide_head * bias_head, slope, inside,
                    scale, softcap, bias_row, bias_key, row[None, :], MODIFIED, SOFTCAP, BIAS, ALIBI,
                )  # fmt: skip
                if unmasked == 0:
                    seen = visible(position, k_row[:, None], present, left, right, LEFT, RIGHT)
                    scores = tl.where(seen, scores, -INFINITY)
                weights = tl.exp2(scores * factor - lse[None, :])
                grad_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
                applied = weights
                if DROPOUT:
                    keep = tl.trans(kept(seed_value, sequence * heads + head, row, start, threshold, QUERIES, KEYS))
                    applied = tl.where(keep, weights, 0.0)
                    grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
                acc_value = tl.dot(applied.to(grad.dtype), grad, acc_value, input_precision=PRECISION)
                grad_scores = weights * (grad_weights - row_delta[None, :])
                if SOFTCAP:
                    grad_scores *= derivative
                acc_key = tl.dot(grad_scores.to(q.dtype), q, acc_key, input_precision=PRECISION)

    at = first_token(batch, own, key_first, PACKED) * grad_row + key_head_index.to(tl.int64) * dim
    store_rows(grad_key + at, acc_key * scale, start, grad_row, column, own, dim, KEYS)
    store_rows(grad_value + at, acc_value * keep_scale, start, grad_row, column, own, dim, KEYS)


@triton.jit
def bias_gradient(
    query, key, value, bias, alibi, key_lengths, boundaries_q, boundaries_k, seed, grad_out, stats, delta,
    grad_bias,
    heads, group, queries, keys, dim, sequences,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    bias_batch, bias_head, bias_row, bias_key, alibi_batch, stats_batch,
    scale, softcap, left, right, threshold, keep_scale, batches,
    BIAS: tl.constexpr, ALIBI: tl.constexpr, LENGTHS: tl.constexpr, PACKED: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MODIFIED: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    SAME_BATCH: tl.constexpr, SAME_HEAD: tl.constexpr, SAME_QUERY: tl.constexpr, SAME_KEY: tl.constexpr,
):  # fmt: skip
    """SAME_X: the bias is one and the same along X, and its gradient a sum over it."""
    query_tiles, key_tiles = tl.cdiv(queries, QUERIES), tl.cdiv(keys, KEYS)
    bias_heads = 1 if SAME_HEAD else heads
    own_query = tl.program_id(1)
    own_key = tl.program_id(0)
    own_batch = tl.program_id(2) // bias_heads
    own_head = tl.program_id(2) % bias_heads
    over_batches = batches if SAME_BATCH else 1
    over_heads = heads if SAME_HEAD else 1
    over_queries = query_tiles if SAME_QUERY else 1
    over_keys = key_tiles if SAME_KEY else 1
    column = tl.arange(0, DIM)
    shift = keys - queries
    factor = 1.0
    if not MODIFIED:
        factor = scale * LOG2E
    if DROPOUT:
        seed_value = tl.load(seed)
    acc = tl.zeros((QUERIES, KEYS), tl.float32)
    for item in range(0, over_batches * over_heads * over_queries * over_keys):
        key_tile = own_key + item % over_keys
        query_tile = own_query + item // over_keys % over_queries
        head = own_head + item // (over_keys * over_queries) % over_heads
        sequence = own_batch + item // (over_keys * over_queries * over_heads)
        batch = sequence.to(tl.int64)
        wide_head = head.to(tl.int64)
        present = present_keys(key_lengths, sequence, keys, LENGTHS)
        row = query_tile * QUERIES + tl.arange(0, QUERIES)
        k_row = key_tile * KEYS + tl.arange(0, KEYS)
        key_base = key + batch * key_batch + (wide_head // group) * key_head
        value_base = value + batch * value_batch + (wide_head // group) * value_head
        query_base = query + batch * query_batch + wide_head * query_head
        grad_base = grad_out + (batch * queries * heads + head) * dim
        q = load_rows(query_base, query_tile * QUERIES, query_row, column, queries, dim, True, EVEN, QUERIES)
        grad = load_rows(grad_base, query_tile * QUERIES, heads * dim, column, queries, dim, True, EVEN, QUERIES)
        k = load_rows(key_base, key_tile * KEYS, key_row, column, present, dim, True, EVEN, KEYS)
        v = load_rows(value_base, key_tile * KEYS, value_row, column, present, dim, True, EVEN, KEYS)
        stat = batch * stats_batch + wide_head * queries + row
        lse = tl.load(stats + 2 * stat, mask=row < queries, other=INFINITY)
        row_delta = tl.load(delta + stat, mask=row < queries, other=0.0)
        slope = 0.0
        if ALIBI:
            slope = tl.load(alibi + batch * alibi_batch + head)
        position = (row + shift)[:, None]
        inside = (row[:, None] < queries) & (k_row[None, :] < present)
        scores, _ = logits_and_slope(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), position, k_row[None, :],
            bias + batch * bias_batch + wide_head * bias_head, slope, inside, scale, softcap, bias_row, bias_key,
            row[:, None], MODIFIED, SOFTCAP, BIAS, ALIBI,
        )  # fmt: skip
        seen = visible(position, k_row[None, :], present, left, right, LEFT, RIGHT)
        scores = tl.where(seen, scores, -INFINITY)
        weights = tl.exp2(scores * factor - lse[:, None])
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            keep = kept(seed_value, sequence * heads + head, row, key_tile * KEYS, threshold, QUERIES, KEYS)
            grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
        acc += weights * (grad_weights - row_delta[:, None])

    row = own_query * QUERIES + tl.arange(0, QUERIES)
    k_row = own_key * KEYS + tl.arange(0, KEYS)
    rows = 1 if SAME_QUERY else queries
    columns = 1 if SAME_KEY else keys
    if SAME_QUERY:
        acc = tl.where(row[:, None] == 0, tl.sum(acc, axis=0)[None, :], 0.0)
    if SAME_KEY:
        acc = tl.where(k_row[None, :] == 0, tl.sum(acc, axis=1)[:, None], 0.0)
    at = (tl.program_id(2).to(tl.int64) * rows + row[:, None]) * columns + k_row[None, :]
    tl.store(grad_bias + at, acc, mask=(row[:, None] < rows) & (k_row[None, :] < columns))

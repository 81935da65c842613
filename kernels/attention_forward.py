"""Attention forward: out = softmax(logits) V, with logits over the keys that a query may see

    logit = cap(scale q . k) + bias - slope |position of q - position of k|,    cap(x) = softcap tanh(x / softcap)

(Vaswani et al. 2017; without holding all logits, Dao 2023). Query i stands at key position i + keys - queries.

query [B, H, S_q, D], key and value [B, H_kv, S_k, D] with any strides but the last, or packed sequences [tokens, H, D];
H / H_kv neighbouring heads share a key head. A program has a tile of queries of one head and walks over the keys they
see, first those that all of them see, without masks, then the rest. It reads its queries once and the keys and values
once for each tile of queries, mostly from the L2 cache, and writes out, in memory [B, S_q, H, D], and two floats a
query, of which backward reads the first: (lse, 1), where with logits to base 2 weight = 2^(logit - lse), or (+inf, 0)
for a query that sees no key, which gives zeros.

Grid: tiles of queries of all sequences, by heads.
"""

import triton
import triton.language as tl

from .attention_scores import (
    INFINITY,
    LOG2E,
    attend,
    first_token,
    keys_seen,
    load_rows,
    locate,
    present_keys,
    store_rows,
)


@triton.jit
def forward(
    query, key, value, bias, alibi, key_lengths, boundaries_q, boundaries_k, seed, out, stats,
    heads, group, queries, keys, dim, sequences,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    bias_batch, bias_head, bias_row, bias_key, alibi_batch, stats_batch,
    scale, softcap, left, right, threshold, keep_scale,
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
    seed_value = tl.cast(0, tl.int64)
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
    real = (row < own)[:, None]
    q = load_rows(query, tile * QUERIES, query_row, column, own, dim, True, EVEN, QUERIES)
    acc = tl.zeros((QUERIES, DIM), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)

    first = tile * QUERIES + shift
    last = tl.minimum(tile * QUERIES + QUERIES, own) - 1 + shift
    begin, seen_by_all, end = keys_seen(first, last, present, left, right, LEFT, RIGHT, KEYS)
    for masked in tl.static_range(2):
        from_key = begin if masked == 0 else seen_by_all
        to_key = seen_by_all if masked == 0 else end
        acc, top, total = attend(
            acc, top, total, q, key, value, from_key, to_key, present, real, position, row[:, None], column, dim,
            key_row, value_row, bias, bias_row, bias_key, slope, scale, softcap, left, right, factor,
            seed_value, sequence * heads + head, threshold, row,
            BIAS, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT, MODIFIED, PRECISION, EVEN, QUERIES, KEYS, masked == 1,
        )  # fmt: skip

    some = total != 0.0
    inverse = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    acc *= (inverse * keep_scale)[:, None]
    out += (first_token(batch, own, query_first, PACKED) * heads + head) * dim
    store_rows(out, acc, tile * QUERIES, heads * dim, column, own, dim, QUERIES)
    stat = stats + 2 * (batch * stats_batch + wide_head * queries + query_first + row)
    tl.store(stat, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), INFINITY), mask=row < own)
    tl.store(stat + 1, tl.where(some, 1.0, 0.0), mask=row < own)

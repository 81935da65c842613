"""Attention forward of few queries and many keys, as in generation: the equations of `attention_forward.py`.

All queries of all heads that share a key head are one tile, row i * group + member, so keys and values are read once
for them; and where that leaves processors idle, the keys are split over programs (Flash-Decoding, Dao et al. 2023).
Each program leaves its sums in float32: weighted values [rows, D], the largest logit, the sum of weights; `combine`
adds them in the order of the splits. How many splits there are follows from shapes and the number of processors alone,
so results are the same bits each time. With one split, the first kernel writes the result itself.

Grid: splits of all batches by key heads; for `combine`, a program to a query of a head.
"""

import triton
import triton.language as tl

from .attention_scores import INFINITY, LOG2E, attend, keys_seen, present_keys


@triton.jit
def decode(
    query, key, value, bias, alibi, key_lengths, boundaries_q, boundaries_k, seed, out, stats, parts, part_stats,
    heads, group, queries, keys, dim, sequences,
    query_batch, query_head, query_row, key_batch, key_head, key_row, value_batch, value_head, value_row,
    bias_batch, bias_head, bias_row, bias_key, alibi_batch, stats_batch,
    scale, softcap, left, right, threshold, keep_scale, first_key, span, splits,
    BIAS: tl.constexpr, ALIBI: tl.constexpr, LENGTHS: tl.constexpr, PACKED: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, MODIFIED: tl.constexpr, PRECISION: tl.constexpr,
    EVEN: tl.constexpr, DIM: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Of keys from `first_key` on, a program takes `span`, a multiple of KEYS as first_key is."""
    tl.static_assert(not PACKED and not DROPOUT, "these take the general kernel")
    split = tl.program_id(0) % splits
    sequence = tl.program_id(0) // splits
    batch = sequence.to(tl.int64)
    key_head_index = tl.program_id(1).to(tl.int64)
    key += batch * key_batch + key_head_index * key_head
    value += batch * value_batch + key_head_index * value_head
    present = present_keys(key_lengths, sequence, keys, LENGTHS)
    factor = 1.0
    if not MODIFIED:
        factor = scale * LOG2E

    tile_row = tl.arange(0, QUERIES)
    row = tile_row // group
    head = key_head_index * group + tile_row % group
    real = row < queries
    column = tl.arange(0, DIM)
    shift = keys - queries
    q_at = query + batch * query_batch + head * query_head + row.to(tl.int64) * query_row
    q = tl.load(q_at[:, None] + column[None, :], mask=real[:, None] & (column < dim)[None, :], other=0.0)
    slope = 0.0
    if ALIBI:
        slope = tl.load(alibi + batch * alibi_batch + head, mask=real, other=0.0)[:, None]
    biases = bias
    if BIAS != "none":
        biases = bias + batch * bias_batch + (head * bias_head)[:, None]
    acc = tl.zeros((QUERIES, DIM), tl.float32)
    top = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)

    _, seen_by_all, end = keys_seen(shift, keys - 1, present, left, right, LEFT, RIGHT, KEYS)
    begin = first_key + split * span
    end = tl.minimum(begin + span, end)
    seen_by_all = tl.minimum(tl.maximum(seen_by_all, begin), begin + span)
    for masked in tl.static_range(2):
        from_key = begin if masked == 0 else seen_by_all
        to_key = seen_by_all if masked == 0 else end
        acc, top, total = attend(
            acc, top, total, q, key, value, from_key, to_key, present, real[:, None], (row + shift)[:, None],
            row[:, None], column, dim, key_row, value_row, biases, bias_row, bias_key, slope, scale, softcap,
            left, right, factor, seed, 0, threshold, row,
            BIAS, ALIBI, SOFTCAP, DROPOUT, LEFT, RIGHT, MODIFIED, PRECISION, EVEN, QUERIES, KEYS, masked == 1,
        )  # fmt: skip

    stat = batch * stats_batch + head * queries + row
    inside = real[:, None] & (column < dim)[None, :]
    if SPLIT:
        part = stat * splits + split
        tl.store(parts + part[:, None] * dim + column[None, :], acc, mask=inside)
        tl.store(part_stats + 2 * part, top, mask=real)
        tl.store(part_stats + 2 * part + 1, total, mask=real)
    else:
        some = total != 0.0
        inverse = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
        at = ((batch * queries + row) * heads + head) * dim
        result = (acc * inverse[:, None]).to(out.dtype.element_ty)
        tl.store(out + at[:, None] + column[None, :], result, mask=inside)
        tl.store(stats + 2 * stat, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), INFINITY), mask=real)
        tl.store(stats + 2 * stat + 1, tl.where(some, 1.0, 0.0), mask=real)


@triton.jit
def combine(
    parts, part_stats, out, stats, heads, queries, dim, splits,
    SPLITS: tl.constexpr, TOGETHER: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """out = sum_s 2^(top_s - top) acc_s / sum_s 2^(top_s - top) total_s, TOGETHER splits at a time."""
    stat = tl.program_id(0).to(tl.int64)
    first = stat * splits
    split = tl.arange(0, SPLITS)
    tops = tl.load(part_stats + 2 * (first + split), mask=split < splits, other=float("-inf"))
    totals = tl.load(part_stats + 2 * (first + split) + 1, mask=split < splits, other=0.0)
    top = tl.max(tops, axis=0)
    base = tl.where(top == -INFINITY, 0.0, top)
    total = tl.sum(totals * tl.exp2(tops - base), axis=0)
    column = tl.arange(0, DIM)
    acc = tl.zeros((TOGETHER, DIM), tl.float32)
    for start in range(0, splits, TOGETHER):
        member = start + tl.arange(0, TOGETHER)
        share = tl.exp2(tl.load(part_stats + 2 * (first + member), mask=member < splits, other=float("-inf")) - base)
        inside = (member < splits)[:, None] & (column < dim)[None, :]
        part = tl.load(parts + (first + member)[:, None] * dim + column[None, :], mask=inside, other=0.0)
        acc += part * share[:, None]
    some = total != 0.0
    inverse = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    result = tl.sum(acc, axis=0) * inverse
    batch = stat // (heads * queries)
    head = stat // queries % heads
    at = ((batch * queries + stat % queries) * heads + head) * dim + column
    tl.store(out + at, result.to(out.dtype.element_ty), mask=column < dim)
    tl.store(stats + 2 * stat, tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), INFINITY))
    tl.store(stats + 2 * stat + 1, tl.where(some, 1.0, 0.0))

"""What the kernels of attention share: which sequence and keys a program has, what becomes of a score, and dropout.

A tile of scores is [queries, keys] or, in the kernel of dK and dV, the other way round: functions here take positions
that are already shaped to broadcast against it.
"""

import triton
import triton.language as tl

from ._activation import tanh

LOG2E = tl.constexpr(1.4426950408889634)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def locate(
    program, own_boundaries, other_boundaries, sequences, own, other,
    REVERSED: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sequence and tile of a program: (sequence, tile, own first row and count, other first row and count).

    Packed sequences have tiles of their own: sequence i those from boundaries[i] // BLOCK + i on, which are at least as
    many as it needs, so that the grid's size follows from the number of tokens, which the host knows, and no length has
    to be read. Rows count from the start of the batch; a batch that is not packed has its own base address.
    """
    if PACKED:
        low = tl.cast(0, tl.int32)
        high = tl.cast(sequences, tl.int32)
        while high - low > 1:
            middle = (low + high) // 2
            before = tl.load(own_boundaries + middle).to(tl.int32) // BLOCK + middle <= program
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle)
        sequence = low
        own_first = tl.load(own_boundaries + sequence).to(tl.int32)
        other_first = tl.load(other_boundaries + sequence).to(tl.int32)
        own_count = tl.load(own_boundaries + sequence + 1).to(tl.int32) - own_first
        other_count = tl.load(other_boundaries + sequence + 1).to(tl.int32) - other_first
        tile = program - (own_first // BLOCK + sequence)
    else:
        tiles = tl.cdiv(own, BLOCK)
        sequence = program // tiles
        tile = program % tiles
        if REVERSED:  # the last queries see most keys: they begin first
            tile = tiles - 1 - tile
        own_first = tl.cast(0, tl.int32)
        other_first = tl.cast(0, tl.int32)
        own_count = own
        other_count = other
    return sequence, tile, own_first, own_count, other_first, other_count


@triton.jit
def first_token(batch, rows, first, PACKED: tl.constexpr):
    """Of a sequence, in a tensor that lies in memory as [B, S, H, D]."""
    if PACKED:
        token = first.to(tl.int64)
    else:
        token = batch * rows
    return token


@triton.jit
def present_keys(key_lengths, sequence, keys, LENGTHS: tl.constexpr):
    """How many of a sequence's keys there are; never more than memory holds."""
    present = keys
    if LENGTHS:
        present = tl.minimum(keys, tl.maximum(0, tl.load(key_lengths + sequence).to(tl.int32)))
    return present


@triton.jit
def load_rows(
    base, first, stride, column, count, dim, MASKED: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Rows of a matrix from `first` on, [ROWS, columns]; zeros from `count` if MASKED, and from `dim` unless EVEN.

    The way to the first row is 64-bit; offsets within the tile are 32-bit, as the launcher sees to, and stay in
    registers through a loop.
    """
    row = tl.arange(0, ROWS)[:, None]
    at = base + tl.cast(first, tl.int64) * stride + (row * stride + column[None, :])
    if MASKED and EVEN:
        tile = tl.load(at, mask=row < count - first, other=0.0)
    elif MASKED:
        tile = tl.load(at, mask=(row < count - first) & (column[None, :] < dim), other=0.0)
    elif EVEN:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=column[None, :] < dim, other=0.0)
    return tile


@triton.jit
def store_rows(base, tile, first, stride, column, count, dim, ROWS: tl.constexpr):
    """The other way round."""
    row = tl.arange(0, ROWS)[:, None]
    at = base + tl.cast(first, tl.int64) * stride + (row * stride + column[None, :])
    tl.store(at, tile.to(base.dtype.element_ty), mask=(row < count - first) & (column[None, :] < dim))


@triton.jit
def logits_and_slope(
    scores, position, key, bias, slope, inside, scale, softcap, row_stride, key_stride, row,
    MODIFIED: tl.constexpr, SOFTCAP: tl.constexpr, BIAS: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    """Scores as logits to base 2 (but for a factor, unless MODIFIED), and the derivative of the softcap.

    bias: address of the bias of this head's first row; slope: ALiBi's; inside: which elements of a bias there are.
    """
    derivative = 1.0
    if MODIFIED:
        scores = scores * scale
        if SOFTCAP:
            scores = tanh(scores / softcap)
            derivative = 1.0 - scores * scores
            scores = scores * softcap
        if BIAS != "none":
            at = bias + row.to(tl.int64) * row_stride + key.to(tl.int64) * key_stride
            if BIAS == "boolean":
                scores = tl.where(tl.load(at, mask=inside, other=0) != 0, scores, -INFINITY)
            else:
                scores += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if ALIBI:
            scores -= slope * tl.abs(position - key).to(tl.float32)
        scores = scores * LOG2E
    return scores, derivative


@triton.jit
def visible(position, key, present, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Which keys a query may see, but for a mask that is given as a tensor."""
    seen = key < present
    if RIGHT:
        seen = seen & (key <= position + right)
    if LEFT:
        seen = seen & (key >= position - left)
    return seen


@triton.jit
def keys_seen(first, last, present, left, right, LEFT: tl.constexpr, RIGHT: tl.constexpr, KEYS: tl.constexpr):
    """For queries at positions [first, last]: (begin, middle, end), whole tiles of keys but for the last one.

    Keys outside of [begin, end) are seen by none, those of [begin, middle) by all: none with a window.
    """
    begin, middle, end = 0, present, present
    if RIGHT:
        end = tl.minimum(end, tl.maximum(0, last + right + 1))
        middle = tl.minimum(middle, tl.maximum(0, first + right + 1))
    if LEFT:
        begin = tl.maximum(0, first - left) // KEYS * KEYS
        middle = begin
    return begin, middle // KEYS * KEYS, end


@triton.jit
def attend(
    acc, top, total, q, key, value, from_key, to_key, present, real, position, row, column, dim, key_row, value_row,
    bias, bias_row, bias_key, slope, scale, softcap, left, right, factor, seed, stream, threshold, keep_row,
    BIAS: tl.constexpr, ALIBI: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, MODIFIED: tl.constexpr, PRECISION: tl.constexpr, EVEN: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """A tile of queries and keys [from_key, to_key): weighted values acc, the largest logit and the sum of weights.

    real, position, row: [QUERIES, 1], which queries there are, where they stand among the keys, and their numbers;
    unless MASKED, every query sees all of these keys. seed, stream, threshold, keep_row [QUERIES]: for dropout.
    """
    for start in range(from_key, to_key, KEYS):
        k_row = (start + tl.arange(0, KEYS))[None, :]
        k = load_rows(key, start, key_row, column, present, dim, MASKED, EVEN, KEYS)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        scores, _ = logits_and_slope(
            scores, position, k_row, bias, slope, real & (k_row < present), scale, softcap, bias_row, bias_key, row,
            MODIFIED, SOFTCAP, BIAS, ALIBI,
        )  # fmt: skip
        if MASKED:
            scores = tl.where(visible(position, k_row, present, left, right, LEFT, RIGHT), scores, -INFINITY)
        risen = tl.maximum(top, tl.max(scores, axis=1) * factor)
        base = tl.where(risen == -INFINITY, 0.0, risen)
        weights = tl.exp2(scores * factor - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, axis=1)
        top = risen
        if DROPOUT:
            keep = kept(seed, stream, keep_row, start, threshold, QUERIES, KEYS)
            weights = tl.where(keep, weights, 0.0)
        v = load_rows(value, start, value_row, column, present, dim, MASKED, EVEN, KEYS)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, top, total


@triton.jit
def _words(seed, head, row, group):
    """Philox4x32 with seven rounds (Salmon et al. 2011): four words for each row and each of 16 lanes."""
    lane = tl.arange(0, 16)[None, :].to(tl.uint32)
    zero = lane * 0 + row[:, None].to(tl.uint32) * 0
    x0 = lane + zero
    x1 = row[:, None].to(tl.uint32) + zero
    x2 = zero + tl.cast(head, tl.uint32)
    x3 = zero + tl.cast(group, tl.uint32)
    key0 = zero + seed.to(tl.uint32)
    key1 = zero + (seed >> 32).to(tl.uint32)
    factor0 = zero + 0xD2511F53
    factor1 = zero + 0xCD9E8D57
    for _ in tl.static_range(7):
        high0 = tl.umulhi(x0, factor0)
        high1 = tl.umulhi(x2, factor1)
        low0 = x0 * factor0
        low1 = x2 * factor1
        x0 = high1 ^ x1 ^ key0
        x1 = low1
        x2 = high0 ^ x3 ^ key1
        x3 = low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return x0, x1, x2, x3


@triton.jit
def _halves(word, threshold):
    """[rows, lanes, 2]: whether the low and the high 16 bits of a word keep their weights."""
    return tl.join(((word & 0xFFFF) >= threshold).to(tl.int8), ((word >> 16) >= threshold).to(tl.int8))


@triton.jit
def kept(seed, head, row, start, threshold, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """[ROWS, KEYS]: which weights dropout keeps, for keys from `start` on, a multiple of KEYS (32, 64 or 128).

    The same choices as the CPU kernels make: a counter stands for 16 lanes of 128 neighbouring keys of one query, and
    16 bits of its words for key 128 group + 32 word + 16 half + lane. They depend on no tile's size.
    """
    tl.static_assert(KEYS == 32 or KEYS == 64 or KEYS == 128, "a tile's keys must divide a group of 128")
    w0, w1, w2, w3 = _words(seed, head, row, start // 128)
    threshold = tl.cast(threshold, tl.uint32)
    if KEYS == 128:
        bits = tl.join(
            tl.join(_halves(w0, threshold), _halves(w1, threshold)),
            tl.join(_halves(w2, threshold), _halves(w3, threshold)),
        )
        choices = tl.permute(bits, (0, 4, 3, 2, 1))
    elif KEYS == 64:
        second = start // 64 % 2 == 1
        bits = tl.join(_halves(tl.where(second, w2, w0), threshold), _halves(tl.where(second, w3, w1), threshold))
        choices = tl.permute(bits, (0, 3, 2, 1))
    else:
        place = start // 32 % 4
        word = tl.where(place == 0, w0, tl.where(place == 1, w1, tl.where(place == 2, w2, w3)))
        choices = tl.permute(_halves(word, threshold), (0, 2, 1))
    return tl.reshape(choices, (ROWS, KEYS)) != 0

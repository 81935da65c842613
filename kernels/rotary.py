"""rotary on NVIDIA GPUs: pairs (t_i, t_{i + D/2}) of query and key turned by the angle of their position.

    first'  = first cos_i - second sin_i,               inverse:  first' = first cos_i + second sin_{i + D/2}
    second' = second cos_{i + D/2} + first sin_{i + D/2},        second' = second cos_{i + D/2} - first sin_i

The inverse is the transpose, and so the gradient. query [B, H, S, D] and key [B, H_kv, S, D] with any strides but the
last; cos and sin [S, D] or [B or 1, S, D]. Both are read and written once, in one launch: a program takes one position
of one batch, all heads of query and then of key, so that cos and sin are read once for all of them. Outputs lie in
memory as [B, S, H, D].
"""

import triton
import triton.language as tl
from torch import Tensor

from . import launch


@triton.jit
def _rotate(
    t, out, heads, batch_stride, head_stride, row_stride, batch, row, length, half,
    cos_first, cos_second, sin_first, sin_second, INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, HALF)[None, :]
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS)[:, None]
        inside = (head < heads) & (i < half)
        source = t + batch * batch_stride + row * row_stride + head.to(tl.int64) * head_stride + i
        first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
        if INVERSE:
            turned_first = first * cos_first + second * sin_second
            turned_second = second * cos_second - first * sin_first
        else:
            turned_first = first * cos_first - second * sin_first
            turned_second = second * cos_second + first * sin_second
        goal = out + ((batch * length + row) * heads + head) * (2 * half) + i
        tl.store(goal, turned_first.to(out.dtype.element_ty), mask=inside)
        tl.store(goal + half, turned_second.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotary(
    query, key, cos, sin, query_out, key_out, length, half, query_heads, key_heads,
    query_batch, query_head, query_row, key_batch, key_head, key_row, cos_batch, cos_row, sin_batch, sin_row,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    batch, row = program // length, program % length
    i = tl.arange(0, HALF)[None, :]
    cos += batch * cos_batch + row * cos_row + i
    sin += batch * sin_batch + row * sin_row + i
    cos_first = tl.load(cos, mask=i < half, other=0.0).to(tl.float32)
    cos_second = tl.load(cos + half, mask=i < half, other=0.0).to(tl.float32)
    sin_first = tl.load(sin, mask=i < half, other=0.0).to(tl.float32)
    sin_second = tl.load(sin + half, mask=i < half, other=0.0).to(tl.float32)
    _rotate(
        query, query_out, query_heads, query_batch, query_head, query_row, batch, row, length, half,
        cos_first, cos_second, sin_first, sin_second, INVERSE, HEADS, HALF,
    )  # fmt: skip
    _rotate(
        key, key_out, key_heads, key_batch, key_head, key_row, batch, row, length, half,
        cos_first, cos_second, sin_first, sin_second, INVERSE, HEADS, HALF,
    )  # fmt: skip


def _contiguous_rows(t: Tensor) -> Tensor:
    return t if t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous()


def _table_strides(t: Tensor) -> tuple[int, int]:
    """From batch to batch and from position to position."""
    return (t.stride(0) if t.dim() == 3 and t.shape[0] > 1 else 0), t.stride(-2)


def choose(heads: int, half: int) -> launch.Rows:
    """Heads at a time by half a head; four warps, or as few as have eight elements a thread."""
    columns = launch.power_of_two(half)
    together = max(1, min(launch.power_of_two(heads), 2048 // columns))
    return launch.Rows(together, columns, warps=min(4, max(1, together * columns // 256)))


def rotary_fwd(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    query, key, cos, sin = (_contiguous_rows(t) for t in (query, key, cos, sin))
    batch, heads, length, dim = query.shape
    query_out, key_out = (t.new_empty((batch, length, t.shape[1], dim)) for t in (query, key))
    choice = choose(max(heads, key.shape[1]), dim // 2)
    launch.run(
        _rotary,
        (batch * length if dim else 0,),
        (
            query, key, cos, sin, query_out, key_out, length, dim // 2, heads, key.shape[1],
            *query.stride()[:3], *key.stride()[:3], *_table_strides(cos), *_table_strides(sin),
        ),
        {"INVERSE": inverse, "HEADS": choice.rows, "HALF": choice.columns},
        choice.warps,
    )  # fmt: skip
    return query_out.transpose(1, 2), key_out.transpose(1, 2)


OPERATORS = {"rotary_fwd": rotary_fwd}

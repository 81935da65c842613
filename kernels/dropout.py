"""dropout on NVIDIA GPUs: y = x / (1 - p) where an element is kept and 0 elsewhere, plus a residual if there is one.

x [rows, width] with contiguous rows. The choices are those of the CPU kernels (`kept` in `attention_scores.py`): they
follow from the seed and the element's row and column, so backward is the same call on the gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from .attention_scores import kept

ROWS, COLUMNS, WARPS = 16, 128, 4  # columns: a group whose choices are made together


@triton.jit
def _dropout(
    x, residual, y, seed, rows, width, x_stride, residual_stride, threshold, factor,
    DROPS: tl.constexpr, ADDS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * COLUMNS
    column = start + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if DROPS:
        keep = kept(tl.load(seed), 0, row, start, threshold, ROWS, COLUMNS)
        value = tl.where(keep, value * factor, 0.0)
    if ADDS:
        value += tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside).to(tl.float32)
    tl.store(y + row[:, None] * width + column[None, :], value.to(y.dtype.element_ty), mask=inside)


def dropout_fwd(x: Tensor, seed: Tensor | None, p: float, residual: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = x.new_empty(x.shape, dtype=dtype)
    rows, width = x.shape
    launch.run(
        _dropout,
        (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS)),
        (
            x, x if residual is None else residual, y, x if seed is None else seed, rows, width, x.stride(0),
            0 if residual is None else residual.stride(0), int(p * 65536 + 0.5), 1 / (1 - p) if p < 1 else 0.0,
        ),
        {"DROPS": p > 0, "ADDS": residual is not None, "ROWS": ROWS, "COLUMNS": COLUMNS},
        WARPS,
    )  # fmt: skip
    return y


def finish(y: Tensor, residual: Tensor | None, seed: Tensor | None, p: float) -> Tensor:
    """dropout(y) + residual, float32 where the residual is; y itself if neither is wanted."""
    if residual is None and seed is None:
        return y
    wide = residual is not None and residual.dtype is torch.float32
    return dropout_fwd(y, seed, p, residual, torch.float32 if wide else y.dtype)


OPERATORS = {"dropout_fwd": dropout_fwd}

"""A dense layer in one kernel: p = x W^T + b, y = act(p), for x [rows, inner], W [columns, inner]; sums are float32.

p is written only where backward needs it, so that x, W and y are all the memory that is moved but for what tiles read
again, where cuBLAS and an element-wise pass write and read p once more. Programs are as many as the processors hold and
walk over the tiles; tiles in a band of GROUP rows follow each other, so that their columns of W are still in the L2
cache. Edges repeat the last row or column, whose products are not stored, instead of masking what is read.

It has not been compared with cuBLAS on a GPU: linear and mlp use it for BMF_TRITON_GEMM=1, or where autotuning has
found it to be faster (`_dense.layer`).
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from . import launch
from ._activation import value_and_slope

MOST_ROWS, MOST_INNER = 256, 64  # of the tiles below, in either direction
GROUP = 8  # tiles of rows that take turns with the same columns
ENABLED = launch.switch("BMF_TRITON_GEMM")


@dataclass(frozen=True)
class Blocks:
    """A tile of y, how much of the inner dimension is read at a time, and how many programs a processor holds."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int
    resident: int = 1


# By GPU, the largest tiles first; each compiles without spilling, whatever the activation.
BLOCKS: dict[int, tuple[Blocks, ...]] = {
    80: (Blocks(128, 128, 32, 8, 4), Blocks(64, 128, 32, 4, 4, 2), Blocks(64, 64, 32, 4, 4, 2)),
    90: (
        Blocks(128, 256, 64, 8, 3),
        Blocks(128, 128, 64, 8, 3),
        Blocks(64, 128, 64, 4, 3, 2),
        Blocks(64, 64, 64, 4, 3, 2),
    ),
    100: (Blocks(128, 128, 64, 8, 3), Blocks(64, 128, 64, 4, 3, 2)),
}


@triton.jit
def _finish(
    acc, bias, y, pre, first_row, first_column, rows, columns,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < rows - first_row)[:, None] & (column < columns - first_column)[None, :]
    if HAS_BIAS:
        acc += tl.load(bias + first_column + column, mask=column < columns - first_column, other=0.0)[None, :]
    at = first_row.to(tl.int64) * columns + first_column + (row[:, None] * columns + column[None, :])
    if SAVE:
        tl.store(pre + at, acc.to(pre.dtype.element_ty), mask=inside)
    value, _ = value_and_slope(acc, KIND)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gemm(
    x, weight, bias, y, pre, rows, columns, inner, x_row, weight_row,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """inner is a multiple of INNER."""
    row_tiles, column_tiles = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    band_tiles = GROUP * column_tiles
    row, column, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    for tile in range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        first_row_tile = tile // band_tiles * GROUP
        height = tl.minimum(row_tiles - first_row_tile, GROUP)
        first_row = (first_row_tile + tile % band_tiles % height) * ROWS
        first_column = tile % band_tiles // height * COLUMNS
        # The way to a tile is 64-bit, offsets within it are 32-bit, as the launcher sees to.
        x_at = x + first_row.to(tl.int64) * x_row
        x_at += tl.minimum(row, rows - 1 - first_row)[:, None] * x_row + k[None, :]
        weight_at = weight + first_column.to(tl.int64) * weight_row
        weight_at += tl.minimum(column, columns - 1 - first_column)[None, :] * weight_row + k[:, None]
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, inner, INNER):
            acc = tl.dot(tl.load(x_at + start), tl.load(weight_at + start), acc, input_precision="ieee")
        # Half a tile at a time: activations need registers of their own.
        first, second = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
        _finish(
            first, bias, y, pre, first_row, first_column, rows, columns, KIND, HAS_BIAS, SAVE, ROWS, COLUMNS // 2
        )  # fmt: skip
        _finish(
            second, bias, y, pre, first_row, first_column + COLUMNS // 2, rows, columns,
            KIND, HAS_BIAS, SAVE, ROWS, COLUMNS // 2,
        )  # fmt: skip


def covers(x: Tensor, weight: Tensor) -> bool:
    """Two-byte elements, whole steps along the inner dimension, and rows that begin at multiples of 16 bytes."""
    widths = (weight.shape[0], x.stride(0), weight.stride(0))
    return (
        x.element_size() == 2
        and x.shape[1] % MOST_INNER == 0 < x.shape[1]
        and all(w % 8 == 0 and w * MOST_ROWS < 2**31 for w in widths)
    )


def candidates(x: Tensor, weight: Tensor) -> tuple[Blocks, ...]:
    """The largest tiles that leave one for every processor, then the others."""
    target = launch.target_of(x)
    blocks = BLOCKS[target.choices]

    def tiles(b: Blocks) -> int:
        return triton.cdiv(x.shape[0], b.rows) * triton.cdiv(weight.shape[0], b.columns)

    best = next((b for b in blocks if tiles(b) >= target.processors), blocks[-1])
    return best, *(b for b in blocks if b != best)


def layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool, blocks: Blocks
) -> tuple[Tensor, Tensor]:
    """act(x W^T + b), and what it is taken of (empty unless `keep`); bias in float32 or x's dtype."""
    (rows, inner), columns = x.shape, weight.shape[0]
    y = x.new_empty(rows, columns)
    pre = x.new_empty(rows if keep else 0, columns)
    tiles = triton.cdiv(rows, blocks.rows) * triton.cdiv(columns, blocks.columns)
    launch.run(
        _gemm,
        (min(tiles, blocks.resident * launch.target_of(x).processors),),
        (
            x, weight, y if bias is None else bias, y, pre,
            rows, columns, inner, x.stride(0), weight.stride(0),
        ),
        {
            "KIND": activation, "HAS_BIAS": bias is not None, "SAVE": keep,
            "GROUP": GROUP, "ROWS": blocks.rows, "COLUMNS": blocks.columns, "INNER": blocks.inner,
        },
        blocks.warps,
        blocks.stages,
    )  # fmt: skip
    return y, pre

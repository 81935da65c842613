"""What rms_norm and layer_norm share. With s = x + residual, per row of `width` elements:

    y  = (s - mean) rstd w + b,      rstd = 1 / sqrt(mean((s - mean)^2) + eps);      rms_norm: mean = 0, no b
    ds = rstd (g - mean(g) - z mean(g z)) + dsum,      z = (s - mean) rstd,  g = dy w;      rms_norm: no mean(g)
    dw = sum over rows of dy z,      db = sum over rows of dy

Forward moves each of x, residual, sum and y once: a row of up to FORWARD_WIDTH columns stays in registers between its
statistics and its output; a wider one is walked over in pieces, again from the L2 cache.

Backward also moves everything once. A fixed number of programs, as many as the processors hold at a time, walks over
the rows; each keeps its own float32 part of dw and db, and a second small kernel adds the parts, column by column, in
one order. Up to REGISTER_WIDTH columns the parts are registers. Wider rows are walked over in pieces,
twice: the second time they come from the L2 cache, as do the parts, which are then kept in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

FORWARD_WIDTH = 16384  # the widest row that forward holds in registers
REGISTER_WIDTH = 4096  # the widest row of which backward holds s, dy, w and two gradients in registers
PIECE = 4096  # columns at a time in wider rows


@triton.jit
def _forward(
    x, residual, weight, bias, y, sums, mean, rstd,
    rows, width, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CENTERED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    s = tl.load(x + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    at = row[:, None] * width + column[None, :]
    if HAS_RESIDUAL:
        r = tl.load(residual + row[:, None] * residual_stride + column[None, :], mask=inside, other=0.0)
        rounded = (s + r.to(tl.float32)).to(sums.dtype.element_ty)  # what the caller sees is what is normed
        tl.store(sums + at, rounded, mask=inside)
        s = rounded.to(tl.float32)
    if CENTERED:
        average = tl.sum(s, axis=1) / width
        tl.store(mean + row, average, mask=row < rows)
        s = tl.where(inside, s - average[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(s * s, axis=1) / width + eps)
    tl.store(rstd + row, scale, mask=row < rows)
    s *= scale[:, None]
    if HAS_WEIGHT:
        s *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        s += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, s.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _forward_wide(
    x, residual, weight, bias, y, sums, mean, rstd,
    rows, width, x_stride, residual_stride, eps,
    HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CENTERED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source = x + row * x_stride
    if HAS_RESIDUAL:
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            s = tl.load(source + column, mask=column < width, other=0.0).to(tl.float32)
            s += tl.load(residual + row * residual_stride + column, mask=column < width, other=0.0).to(tl.float32)
            tl.store(sums + row * width + column, s.to(sums.dtype.element_ty), mask=column < width)
        tl.debug_barrier()  # what follows reads what other threads may have written
        source = sums + row * width
    average = 0.0
    if CENTERED:
        total = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            total += tl.load(source + column, mask=column < width, other=0.0).to(tl.float32)
        average = tl.sum(total, axis=0) / width
        tl.store(mean + row, average)
    squares = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        s = tl.load(source + column, mask=column < width, other=0.0).to(tl.float32)
        squares += tl.where(column < width, (s - average) * (s - average), 0.0)
    scale = tl.rsqrt(tl.sum(squares, axis=0) / width + eps)
    tl.store(rstd + row, scale)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        s = (tl.load(source + column, mask=column < width, other=0.0).to(tl.float32) - average) * scale
        if HAS_WEIGHT:
            s *= tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
        if HAS_BIAS:
            s += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(y + row * width + column, s.to(y.dtype.element_ty), mask=column < width)


@triton.jit
def _store_gradient(grad, narrow, grad_sum, at, value, inside, HAS_GRAD_SUM: tl.constexpr, NARROW: tl.constexpr):
    if HAS_GRAD_SUM:
        value += tl.load(grad_sum + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad + at, value.to(grad.dtype.element_ty), mask=inside)
    if NARROW:
        tl.store(narrow + at, value.to(narrow.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_y, grad_sum, sums, weight, mean, rstd, grad, narrow, weight_parts, bias_parts,
    rows, width, grad_y_stride, sums_stride,
    HAS_WEIGHT: tl.constexpr, HAS_GRAD_SUM: tl.constexpr, CENTERED: tl.constexpr, NARROW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    present = column < width
    if HAS_WEIGHT:
        w = tl.load(weight + column, mask=present, other=0.0).to(tl.float32)[None, :]
    weight_part = tl.zeros((COLUMNS,), tl.float32)
    bias_part = tl.zeros((COLUMNS,), tl.float32)
    for first in range(program * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & present[None, :]
        dy = tl.load(grad_y + row[:, None] * grad_y_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        z = tl.load(sums + row[:, None] * sums_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        if CENTERED:
            z -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        z = tl.where(inside, z * scale, 0.0)
        weight_part += tl.sum(dy * z, axis=0)
        bias_part += tl.sum(dy, axis=0)
        if HAS_WEIGHT:
            dy *= w
        ds = dy - z * (tl.sum(dy * z, axis=1) / width)[:, None]
        if CENTERED:
            ds -= (tl.sum(dy, axis=1) / width)[:, None]
        at = row[:, None] * width + column[None, :]
        _store_gradient(grad, narrow, grad_sum, at, ds * scale, inside, HAS_GRAD_SUM, NARROW)
    part = program.to(tl.int64) * width + column
    tl.store(weight_parts + part, weight_part, mask=present)
    if CENTERED:
        tl.store(bias_parts + part, bias_part, mask=present)


@triton.jit
def _load_piece(
    grad_y, sums, weight, column, width, average, scale,
    HAS_WEIGHT: tl.constexpr, CENTERED: tl.constexpr,
):  # fmt: skip
    """dy, z and g of some columns of a row."""
    inside = column < width
    dy = tl.load(grad_y + column, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(sums + column, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        z -= average
    z = tl.where(inside, z * scale, 0.0)
    g = dy
    if HAS_WEIGHT:
        g = dy * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    return dy, z, g


@triton.jit
def _backward_wide(
    grad_y, grad_sum, sums, weight, mean, rstd, grad, narrow, weight_parts, bias_parts,
    rows, width, grad_y_stride, sums_stride,
    HAS_WEIGHT: tl.constexpr, HAS_GRAD_SUM: tl.constexpr, CENTERED: tl.constexpr, NARROW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    parts = program.to(tl.int64) * width
    for first in range(program, rows, tl.num_programs(0)):
        row = tl.cast(first, tl.int64)
        dy_row = grad_y + row * grad_y_stride
        sums_row = sums + row * sums_stride
        scale = tl.load(rstd + row)
        average = 0.0
        if CENTERED:
            average = tl.load(mean + row)
        along = tl.zeros((COLUMNS,), tl.float32)
        total = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            _, z, g = _load_piece(dy_row, sums_row, weight, column, width, average, scale, HAS_WEIGHT, CENTERED)
            along += g * z
            total += g
        share = tl.sum(along, axis=0) / width
        level = 0.0
        if CENTERED:
            level = tl.sum(total, axis=0) / width
        for start in range(0, width, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < width
            dy, z, g = _load_piece(dy_row, sums_row, weight, column, width, average, scale, HAS_WEIGHT, CENTERED)
            ds = (g - z * share - level) * scale
            _store_gradient(grad, narrow, grad_sum, row * width + column, ds, inside, HAS_GRAD_SUM, NARROW)
            so_far = tl.load(weight_parts + parts + column, mask=inside & (first != program), other=0.0)
            tl.store(weight_parts + parts + column, so_far + dy * z, mask=inside)
            if CENTERED:
                so_far = tl.load(bias_parts + parts + column, mask=inside & (first != program), other=0.0)
                tl.store(bias_parts + parts + column, so_far + dy, mask=inside)
        tl.debug_barrier()  # the next row's loads of the parts come after this row's stores


@triton.jit
def _add_parts(parts, out, count, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (column < width)[None, :]
        total += tl.load(parts + row[:, None].to(tl.int64) * width + column[None, :], mask=inside, other=0.0)
    tl.store(out + column, tl.sum(total, axis=0), mask=column < width)


def add_parts(parts: Tensor) -> Tensor:
    """[parts, width] float32 summed over the parts, in an order that depends on their number alone."""
    count, width = parts.shape
    out = parts.new_empty(width)
    constants = {"ROWS": 16, "COLUMNS": 64}
    launch.run(_add_parts, (triton.cdiv(width, 64),), (parts, out, count, width), constants, warps=4)
    return out


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the sum (empty without a residual), mean (empty unless centered), rstd."""
    shape = x.shape
    x = launch.row_matrix(x)
    rows, width = x.shape
    y = torch.empty(shape, dtype=dtype, device=x.device)
    sums = x.new_empty(0)
    if residual is not None:
        sums = x.new_empty(shape, dtype=torch.promote_types(x.dtype, residual.dtype))
        residual = launch.row_matrix(residual)
    mean = x.new_empty(rows if centered else 0, dtype=torch.float32)
    rstd = x.new_empty(rows, dtype=torch.float32)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    wide = width > FORWARD_WIDTH
    processors = launch.target_of(x).processors
    choice = launch.Rows(1, PIECE, warps=8) if wide else launch.whole_rows(rows, width, processors, most=4096)
    launch.run(
        _forward_wide if wide else _forward,
        (triton.cdiv(rows, choice.rows),),
        (
            *(x if t is None else t for t in (x, residual, weight, bias)),
            y, sums, mean, rstd, rows, width, x.stride(0), 0 if residual is None else residual.stride(0), eps,
        ),
        {
            "HAS_RESIDUAL": residual is not None, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None,
            "CENTERED": centered, "ROWS": choice.rows, "COLUMNS": choice.columns,
        },
        choice.warps,
    )  # fmt: skip
    return y, sums, mean, rstd


def backward(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    sums: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    narrow: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of s, the same in bfloat16 if `narrow`, of weight and of bias (empty unless centered)."""
    centered = mean is not None
    grad = torch.empty(sums.shape, dtype=sums.dtype, device=sums.device)
    grad_narrow = torch.empty(sums.shape if narrow else (0,), dtype=torch.bfloat16, device=sums.device)
    sums, grad_y = launch.row_matrix(sums), launch.row_matrix(grad_y)
    rows, width = sums.shape
    weight = None if weight is None else weight.contiguous()
    grad_sum = None if grad_sum is None else grad_sum.contiguous()
    processors = launch.target_of(sums).processors
    wide = width > REGISTER_WIDTH
    choice = launch.Rows(1, PIECE, warps=8) if wide else launch.whole_rows(rows, width, processors, most=2048)
    resident = max(2, min(8, 2 * REGISTER_WIDTH // (choice.rows * choice.columns)))  # by the registers a program needs
    programs = min(resident * processors, triton.cdiv(rows, choice.rows))
    weight_parts = torch.empty((programs, width), dtype=torch.float32, device=sums.device)
    bias_parts = torch.empty_like(weight_parts) if centered else weight_parts
    launch.run(
        _backward_wide if wide else _backward,
        (programs,),
        (
            grad_y, sums if grad_sum is None else grad_sum, sums, sums if weight is None else weight,
            rstd if mean is None else mean, rstd, grad, grad_narrow, weight_parts, bias_parts,
            rows, width, grad_y.stride(0), sums.stride(0),
        ),
        {
            "HAS_WEIGHT": weight is not None, "HAS_GRAD_SUM": grad_sum is not None, "CENTERED": centered,
            "NARROW": narrow, "ROWS": choice.rows, "COLUMNS": choice.columns,
        },
        choice.warps,
    )  # fmt: skip
    grad_bias = add_parts(bias_parts) if centered else sums.new_empty(0, dtype=torch.float32)
    return grad, grad_narrow, add_parts(weight_parts), grad_bias

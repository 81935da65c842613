"""What linear, mlp and gated_mlp are made of: matrix products by cuBLAS, and element-wise kernels between them.
Where it is asked for, or autotuning has found it to be faster, linear and mlp make a forward product and what follows
it in one kernel instead (`gemm.py`).

A product's bias is added by cuBLAS as it stores, in float32, so that what is left between two products is

    forward   y = act(p)                    gated:  h = act(gate) up
    backward  g = dy act'(p), h = act(p)    gated:  dgate = dh up act'(gate), dup = dh act(gate), h = act(gate) up

each element read and written once. The bias gradient, the sum of g's rows, is made on the way: a program takes a strip
of columns and some blocks of rows, and leaves one float32 row of sums; `_norm.add_parts` then adds these in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import autotune, gemm, launch
from ._activation import value_and_slope
from ._norm import add_parts

ELEMENTS = launch.Rows(1, 2048, warps=4)  # of a kernel without rows: 16 a thread
STRIP = launch.Rows(16, 128, warps=4)  # of a kernel that sums over rows: 256 bytes of bfloat16 side by side
SLICES = 8  # programs per processor


@triton.jit
def _activate(pre, y, count, KIND: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    value, _ = value_and_slope(tl.load(pre + i, mask=i < count, other=0.0).to(tl.float32), KIND)
    tl.store(y + i, value.to(y.dtype.element_ty), mask=i < count)


@triton.jit
def _gate(gate, up, hidden, count, KIND: tl.constexpr, COLUMNS: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    value, _ = value_and_slope(tl.load(gate + i, mask=i < count, other=0.0).to(tl.float32), KIND)
    product = value * tl.load(up + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(hidden + i, product.to(hidden.dtype.element_ty), mask=i < count)


@triton.jit
def _gate_backward(grad, gate, up, grad_gate, grad_up, count, KIND: tl.constexpr, COLUMNS: tl.constexpr):
    """The hidden activations take the place of their gradient."""
    i = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = i < count
    dh = tl.load(grad + i, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=inside, other=0.0).to(tl.float32)
    value, slope = value_and_slope(tl.load(gate + i, mask=inside, other=0.0).to(tl.float32), KIND)
    tl.store(grad_gate + i, (dh * u * slope).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + i, (dh * value).to(grad_up.dtype.element_ty), mask=inside)
    tl.store(grad + i, (value * u).to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _activation_backward(
    grad_y, pre, grad, hidden, parts, rows, columns, SUM: tl.constexpr, HIDDEN: tl.constexpr, KIND: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    part = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(tl.program_id(1) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        at = row[:, None] * columns + column[None, :]
        g = tl.load(grad_y + at, mask=inside, other=0.0).to(tl.float32)
        if KIND != "none":
            value, slope = value_and_slope(tl.load(pre + at, mask=inside, other=0.0).to(tl.float32), KIND)
            g *= slope
            tl.store(grad + at, g.to(grad.dtype.element_ty), mask=inside)
            if HIDDEN:
                tl.store(hidden + at, value.to(hidden.dtype.element_ty), mask=inside)
        if SUM:
            part += tl.where(inside, g, 0.0)
    if SUM:
        tl.store(parts + tl.program_id(1) * columns + column, tl.sum(part, axis=0), mask=column < columns)


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in x's dtype, summed in float32."""
    weight = weight.to(x.dtype)
    return x @ weight.t() if bias is None else torch.addmm(bias.to(x.dtype), x, weight.t())


def layer(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool) -> tuple[Tensor, Tensor]:
    """activation(x W^T + b), and x W^T + b (empty unless `keep`)."""
    if not (gemm.ENABLED or autotune.ENABLED) or not gemm.covers(x, weight):
        return _layer_by_cublas(x, weight, bias, activation, keep)

    def start(blocks: gemm.Blocks | None) -> tuple[Tensor, Tensor]:
        if blocks is None:
            return _layer_by_cublas(x, weight, bias, activation, keep)
        return gemm.layer(x, weight.to(x.dtype), bias, activation, keep, blocks)

    blocks = gemm.candidates(x, weight)
    shape_class = (
        launch.power_of_two(x.shape[0]), *weight.shape, weight.dtype, activation, bias is not None, keep,
    )  # fmt: skip
    return start(autotune.pick("layer", shape_class, blocks if gemm.ENABLED else (None, *blocks), start, x))


def _layer_by_cublas(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, keep: bool
) -> tuple[Tensor, Tensor]:
    pre = matmul(x, weight, bias)
    return activate(pre, activation, keep), pre if keep else x.new_empty(0, weight.shape[0])


def activate(pre: Tensor, activation: str, keep: bool) -> Tensor:
    """activation(pre), in place unless pre is to be kept."""
    if activation == "none":
        return pre
    y = torch.empty_like(pre) if keep else pre
    _run_elements(_activate, (pre, y), activation)
    return y


def gate(gate: Tensor, up: Tensor, activation: str, keep: bool) -> Tensor:
    """activation(gate) up, in gate's place unless it is to be kept."""
    hidden = torch.empty_like(gate) if keep else gate
    _run_elements(_gate, (gate, up, hidden), activation)
    return hidden


def gate_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and up, and the hidden activations, which overwrite `grad`."""
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    _run_elements(_gate_backward, (grad, gate, up, grad_gate, grad_up), activation)
    return grad_gate, grad_up, grad


def _run_elements(kernel, tensors: tuple[Tensor, ...], activation: str) -> None:
    count = tensors[0].numel()
    constants = {"KIND": activation, "COLUMNS": ELEMENTS.columns}
    launch.run(kernel, (triton.cdiv(count, ELEMENTS.columns),), (*tensors, count), constants, ELEMENTS.warps)


def activation_backward(
    grad_y: Tensor, pre: Tensor, activation: str, *, out: Tensor | None, want_bias: bool, want_hidden: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient before the activation (into `out`, if given), activation(pre), bias gradient; empty where not wanted."""
    rows, columns = grad_y.shape
    grad = grad_y if activation == "none" else torch.empty_like(grad_y) if out is None else out
    hidden = torch.empty_like(pre) if want_hidden else pre.new_empty(0)
    strips = triton.cdiv(columns, STRIP.columns)
    programs = SLICES * launch.target_of(grad_y).processors
    slices = max(1, min(triton.cdiv(rows, STRIP.rows), programs // max(1, strips)))
    parts = torch.empty((slices if want_bias else 0, columns), dtype=torch.float32, device=grad_y.device)
    if activation != "none" or want_bias:
        launch.run(
            _activation_backward,
            (strips, slices),
            (grad_y, pre, grad, hidden, parts, rows, columns),
            {
                "SUM": want_bias, "HIDDEN": want_hidden, "KIND": activation,
                "ROWS": STRIP.rows, "COLUMNS": STRIP.columns,
            },
            STRIP.warps,
        )  # fmt: skip
    return grad, hidden, add_parts(parts) if want_bias else parts.new_empty(0)


def input_gradient(grad: Tensor, weight: Tensor, want: bool) -> Tensor:
    return grad @ weight.to(grad.dtype) if want else grad.new_empty(0, weight.shape[1])


def weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, want: bool) -> Tensor:
    """g^T x in the weight's dtype."""
    return (grad.t() @ x).to(weight.dtype) if want else weight.new_empty(0, weight.shape[1])


def accumulate(total: Tensor, grad: Tensor, x: Tensor, *, fresh: bool) -> None:
    """total += g^T x (or = if `fresh`), with total in float32 whatever the dtype of g and x."""
    beta = 0.0 if fresh else 1.0
    if grad.dtype is torch.float32:
        torch.addmm(total, grad.t(), x, beta=beta, out=total)
    elif grad.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, grad.t(), x, torch.float32, beta=beta, out=total)
    else:  # tensors of the interpreter, and those without memory: no such product is defined for them
        torch.addmm(total, grad.t().float(), x.float(), beta=beta, out=total)

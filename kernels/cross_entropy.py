"""cross_entropy on NVIDIA GPUs. For logits x with target t, smoothing e and z = x or, capped, z = c tanh(x / c):

    top = max_j z_j,  log_sum = log sum_j exp(z_j - top),  lse = top + log_sum
    loss = (1 - e) (lse - z_t) + e (lse - mean_j z_j);   0 where the target is ignored, NaN where it is no class
    dx_j = scale (exp(z_j - lse) - (1 - e) [j = t] - e / classes) (1 - (z_j / c)^2 if capped)

logits [rows, classes] with contiguous rows. Both parts of lse are kept, [rows, 2]: their sum would be rounded to the
precision of the largest logit. Forward reads the logits once, a program to a row, with a running maximum and sum over
pieces of it; backward reads them once and writes as much, a program to a piece of a row. Rows whose target is ignored
are not read.

`differentiate_in_place` does both for linear_cross_entropy: a program finds its row's lse, then goes over the row again
while it is in the L2 cache and puts the gradient in the logits' place.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch
from ._activation import tanh


@triton.jit
def _capped(x, softcap, SOFTCAP: tl.constexpr):
    z = x
    if SOFTCAP:
        z = tanh(x / softcap) * softcap
    return z


@triton.jit
def _statistics(logits, classes, softcap, SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr, COLUMNS: tl.constexpr):
    """top, log_sum and, for smoothing, the sum of a row's logits less top."""
    top = float("-inf")
    total = 0.0
    level = 0.0
    for start in range(0, classes, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        x = tl.load(logits + column, mask=column < classes, other=float("-inf")).to(tl.float32)
        z = tl.where(column < classes, _capped(x, softcap, SOFTCAP), float("-inf"))
        risen = tl.maximum(top, tl.max(z, axis=0))
        base = tl.where(risen == float("-inf"), 0.0, risen)
        total = total * tl.exp(top - base) + tl.sum(tl.exp(z - base), axis=0)
        if SMOOTH:
            level += tl.sum(tl.where(column < classes, z, 0.0), axis=0)
        top = risen
    if SMOOTH:
        level -= top * classes
    return top, tl.log(total), level


@triton.jit
def _loss(
    logits, target, classes, top, log_sum, level, smoothing, softcap, SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr
):
    """A row's loss, and whether no logit is above the target's."""
    valid = (target >= 0) & (target < classes)
    chosen = _capped(tl.load(logits + tl.where(valid, target, 0)).to(tl.float32), softcap, SOFTCAP)
    loss = log_sum + (top - chosen)
    if SMOOTH:
        loss = (1.0 - smoothing) * loss + smoothing * (log_sum - level / classes)
    correct = valid & (chosen >= top)
    return tl.where(valid, loss, float("nan")), correct


@triton.jit
def _slope(
    x, column, target, classes, top, log_sum, scale, smoothing, softcap, SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr
):
    """The gradient of the loss with respect to some of a row's logits x."""
    z = _capped(x, softcap, SOFTCAP)
    hit = column == target
    if SMOOTH:
        goal = tl.where(hit, 1.0 - smoothing + smoothing / classes, smoothing / classes)
    else:
        goal = tl.where(hit, 1.0, 0.0)
    grad = scale * (tl.exp(z - top - log_sum) - goal)
    if SOFTCAP:
        grad *= 1.0 - (z / softcap) * (z / softcap)
    return grad


@triton.jit
def _forward(
    logits, target, loss, lse, classes, stride, ignore_index, smoothing, softcap,
    SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    t = tl.load(target + row)
    if t == ignore_index:
        tl.store(lse + 2 * row, 0.0)
        tl.store(lse + 2 * row + 1, 0.0)
        tl.store(loss + row, 0.0)
    else:
        top, log_sum, level = _statistics(logits, classes, softcap, SOFTCAP, SMOOTH, COLUMNS)
        tl.store(lse + 2 * row, top)
        tl.store(lse + 2 * row + 1, log_sum)
        value, _ = _loss(logits, t, classes, top, log_sum, level, smoothing, softcap, SOFTCAP, SMOOTH)
        tl.store(loss + row, value)


@triton.jit
def _backward(
    logits, target, lse, scale, grad, classes, stride, scale_stride, ignore_index, smoothing, softcap,
    SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    pieces = tl.cdiv(classes, COLUMNS)
    row = tl.program_id(0).to(tl.int64) // pieces
    column = (tl.program_id(0) % pieces) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < classes
    t = tl.load(target + row)
    if t == ignore_index:
        g = tl.zeros((COLUMNS,), tl.float32)
    else:
        x = tl.load(logits + row * stride + column, mask=inside, other=0.0).to(tl.float32)
        g = _slope(
            x, column, t, classes, tl.load(lse + 2 * row), tl.load(lse + 2 * row + 1),
            tl.load(scale + row * scale_stride), smoothing, softcap, SOFTCAP, SMOOTH,
        )  # fmt: skip
    tl.store(grad + row * classes + column, g.to(grad.dtype.element_ty), mask=inside)


@triton.jit
def _in_place(
    logits, target, loss, correct, scale, classes, stride, scale_stride, ignore_index, smoothing, softcap,
    GRADIENT: tl.constexpr, SOFTCAP: tl.constexpr, SMOOTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    t = tl.load(target + row)
    if t == ignore_index:
        tl.store(loss + row, 0.0)
        tl.store(correct + row, 0.0)
        if GRADIENT:
            for start in range(0, classes, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                tl.store(logits + column, tl.zeros((COLUMNS,), logits.dtype.element_ty), mask=column < classes)
    else:
        top, log_sum, level = _statistics(logits, classes, softcap, SOFTCAP, SMOOTH, COLUMNS)
        value, hit = _loss(logits, t, classes, top, log_sum, level, smoothing, softcap, SOFTCAP, SMOOTH)
        tl.store(loss + row, value)
        tl.store(correct + row, hit.to(tl.float32))
        if GRADIENT:
            tl.debug_barrier()  # the target's logit has been read before it is overwritten
            factor = tl.load(scale + row * scale_stride)
            for start in range(0, classes, COLUMNS):
                column = start + tl.arange(0, COLUMNS)
                inside = column < classes
                x = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32)
                g = _slope(x, column, t, classes, top, log_sum, factor, smoothing, softcap, SOFTCAP, SMOOTH)
                tl.store(logits + column, g.to(logits.dtype.element_ty), mask=inside)


def choose(classes: int) -> launch.Rows:
    """Columns at a time: 16 a thread, and no more than a row has."""
    columns = min(8192, launch.power_of_two(classes))
    return launch.Rows(1, columns, warps=max(1, columns // 512))


def _constants(choice: launch.Rows, label_smoothing: float, softcap: float) -> dict:
    return {"SOFTCAP": softcap != 0, "SMOOTH": label_smoothing != 0, "COLUMNS": choice.columns}


def count_used(target: Tensor, ignore_index: int) -> Tensor:
    """How many targets are not ignored, as a float32 scalar on the device."""
    return (target != ignore_index).sum().float()


def cross_entropy_fwd(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, softcap: float, reduction: str
):
    x, shape, target = launch.row_matrix(logits), target.shape, target.contiguous()
    rows, classes = x.shape
    loss, lse = x.new_empty(shape, dtype=torch.float32), x.new_empty((rows, 2), dtype=torch.float32)
    choice = choose(classes)
    launch.run(
        _forward,
        (rows,),
        (x, target, loss, lse, classes, x.stride(0), ignore_index, label_smoothing, softcap),
        _constants(choice, label_smoothing, softcap),
        choice.warps,
    )
    if reduction == "none":
        return loss, lse
    return (loss.sum() if reduction == "sum" else loss.sum() / count_used(target, ignore_index)), lse


def cross_entropy_bwd(
    grad_loss: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    reduction: str,
) -> Tensor:
    grad = logits.new_empty(logits.shape)
    x, target = launch.row_matrix(logits), target.contiguous()
    rows, classes = x.shape
    scale = grad_loss.contiguous() if reduction != "mean" else grad_loss / count_used(target, ignore_index)
    choice = choose(classes)
    launch.run(
        _backward,
        (rows * triton.cdiv(classes, choice.columns),),
        (
            x, target, lse, scale, grad, classes, x.stride(0), int(reduction == "none"), ignore_index,
            label_smoothing, softcap,
        ),
        _constants(choice, label_smoothing, softcap),
        choice.warps,
    )  # fmt: skip
    return grad


def differentiate_in_place(
    logits: Tensor,
    target: Tensor,
    loss: Tensor,
    correct: Tensor,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
) -> None:
    """Writes each row's loss, 1 to `correct` if its target has the highest logit and 0 if not, and, if `scale` (one, or
    one for each row) is given, the gradient in the logits' place.
    """
    rows, classes = logits.shape
    choice = choose(classes)
    launch.run(
        _in_place,
        (rows,),
        (
            logits, target, loss, correct, loss if scale is None else scale, classes, logits.stride(0),
            int(scale is not None and scale.dim() == 1), ignore_index, label_smoothing, softcap,
        ),
        {"GRADIENT": scale is not None, **_constants(choice, label_smoothing, softcap)},
        choice.warps,
    )  # fmt: skip


OPERATORS = {"cross_entropy_fwd": cross_entropy_fwd, "cross_entropy_bwd": cross_entropy_bwd}

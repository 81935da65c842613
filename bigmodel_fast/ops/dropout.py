"""dropout: y = x / (1 - p) where an element is kept, 0 elsewhere (Srivastava et al. 2014), plus a residual."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _checks, _dense
from ._autograd import apply


def reference(x: Tensor, p: float = 0.5, *, residual: Tensor | None = None) -> Tensor:
    """Plain torch."""
    return _dense.finish(x, p, residual)


@torch.library.register_fake("bigmodel_fast::dropout_fwd")
def _(x, seed, p, residual, dtype):
    return x.new_empty(x.shape, dtype=dtype)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(x, residual, seed, p):
        flat = None if residual is None else _dense.rows(residual)
        y = torch.ops.bigmodel_fast.dropout_fwd(_dense.rows(x), seed, p, flat, _dense.finished_dtype(x, residual))
        return _dense.shaped(y, x.shape)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, residual, seed, ctx.p = inputs
        ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
        ctx.save_for_backward(seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (seed,) = ctx.saved_tensors
        dx = _dense.before_finish(dy, seed, ctx.p, ctx.x_dtype).view(dy.shape)
        return dx, dy.to(ctx.residual_dtype) if ctx.needs_input_grad[1] else None, None, None


def dropout(x: Tensor, p: float = 0.5, *, residual: Tensor | None = None) -> Tensor:
    """Drops elements of x with probability p and divides the others by 1 - p; then adds the residual.

    No mask is stored: backward makes the same choices again from a seed drawn from torch's generator. `linear`, `mlp`
    and `gated_mlp` do the same to their output at no cost of its own (`dropout_p`, `residual`).

    Args:
        x: [..., width], any strides; float32, bfloat16 or (by reference) another floating dtype.
        p: probability to drop, in [0, 1]; taken to 16 bits.
        residual: as x in shape; its dtype may differ.

    Returns:
        As x in shape; in x's dtype, or float32 with a float32 residual.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices do not fit together, or p is out of range.
    """
    if residual is None and p != 0 and isinstance(x, Tensor) and x.dim() > 0:
        y = _dispatch.small("dropout", torch.dropout, x, x.numel(), x, p, True)
        if y is not None:
            return y
    _checks.floating("dropout", x=x, **_checks.given(residual=residual))
    if x.dim() == 0:
        raise ValueError(f"dropout: x must be [..., width], got {_checks.describe(x)}")
    _dense.check_finish("dropout", "p", p, residual, tuple(x.shape))
    if p == 0 and residual is None:
        return x
    reason = _dispatch.unsupported(x, residual) or _dispatch.too_few("dropout", x, x.numel())
    if not _dispatch.use_native("dropout", reason, x):
        return reference(x, p, residual=residual)
    return apply(_Dropout, x, residual, _dense.draw_seed(p, x.device), p)

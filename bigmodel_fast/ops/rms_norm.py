"""rms_norm: y = s / sqrt(mean(s^2) + eps) * weight with s = x + residual (Zhang and Sennrich 2019)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _checks, _norm
from ._autograd import apply


def reference(x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None):
    """Plain torch; y in x's dtype (autocast's within it), the sum in the promoted dtype of x and residual."""
    s = x if residual is None else x.to(torch.promote_types(x.dtype, residual.dtype)) + residual
    wide = s.to(torch.promote_types(torch.promote_types(s.dtype, weight.dtype), torch.float32))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(wide.dtype)
    y = y.to(_norm.output_dtype(x))
    return y if residual is None else (y, s)


def _plain(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if not (isinstance(weight, Tensor) and x.is_floating_point()):
        raise TypeError("torch takes these too")
    shape = (x.shape[-1],)
    if x.dtype is weight.dtype:
        return torch.rms_norm(x, shape, weight, eps)
    wide = torch.promote_types(x.dtype, weight.dtype)  # which torch does by itself, with a warning
    return torch.rms_norm(x.to(wide), shape, weight.to(wide), eps).to(x.dtype)


@torch.library.register_fake("bigmodel_fast::rms_norm_fwd")
def _(x, weight, residual, eps, dtype):
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    s = x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    return x.new_empty(x.shape, dtype=dtype), s, x.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("bigmodel_fast::rms_norm_bwd")
def _(grad_y, grad_sum, sum, weight, rstd, narrow):
    grad_narrow = sum.new_empty(sum.shape if narrow else 0, dtype=torch.bfloat16)
    return sum.new_empty(sum.shape), grad_narrow, weight.new_empty(weight.shape, dtype=torch.float32)


class _RmsNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, residual, eps, dtype):
        return torch.ops.bigmodel_fast.rms_norm_fwd(x, weight, residual, eps, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, residual, _, _ = inputs
        _, s, rstd = output
        ctx.dtypes = x.dtype, None if residual is None else residual.dtype
        ctx.mark_non_differentiable(*([rstd] if residual is not None else [s, rstd]))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else s, weight, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_sum, _):
        s, weight, rstd = ctx.saved_tensors
        if grad_y is None:
            grad_y = torch.zeros_like(s)
        narrow = s.dtype == torch.float32 and torch.bfloat16 in ctx.dtypes
        grad, grad_narrow, grad_weight = torch.ops.bigmodel_fast.rms_norm_bwd(grad_y, grad_sum, s, weight, rstd, narrow)
        x_grad, residual_grad = (t and (grad if t == s.dtype else grad_narrow) for t in ctx.dtypes)
        return x_grad, grad_weight.to(weight.dtype), residual_grad, None, None


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None):
    """Root-mean-square norm over the last dimension, of x or of x + residual.

    Args:
        x: [..., width], any strides.
        weight: [width]; may be float32 with a bfloat16 x.
        eps: added to the mean square.
        residual: as x in shape; its dtype may differ.

    Returns:
        The normed tensor in x's dtype (bfloat16 within an autocast region of bfloat16); with a residual, a pair of it
        and of x + residual in their promoted dtype.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices do not fit together.
    """
    if residual is None and not torch.is_grad_enabled():
        y = _norm.small("rms_norm", _plain, x, weight, eps)
        if y is not None:
            return y
    _checks.floating("rms_norm", x=x, weight=weight, **_checks.given(residual=residual))
    if x.dim() == 0:
        raise ValueError(f"rms_norm: x must be [..., width], got {_checks.describe(x)}")
    _checks.shape("rms_norm", "weight", weight, (x.shape[-1],), "(x's last dimension)")
    _checks.shape("rms_norm", "residual", residual, tuple(x.shape), "(x's shape)")
    dtype = _norm.output_dtype(x)
    if not _dispatch.use_native("rms_norm", _norm.uncovered(dtype, x, residual, weight), x):
        return reference(x, weight, eps=eps, residual=residual)
    y, s, _ = apply(_RmsNorm, x, weight, residual, eps, dtype)
    return y if residual is None else (y, s)

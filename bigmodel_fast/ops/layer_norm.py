"""layer_norm: y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias with s = x + residual (Ba et al. 2016)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _checks, _dense, _norm
from ._autograd import apply


def reference(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-5, residual: Tensor | None = None
):
    """Plain torch; y in x's dtype (autocast's within it), the sum in the promoted dtype of x and residual."""
    s = x if residual is None else x.to(torch.promote_types(x.dtype, residual.dtype)) + residual
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    weight, bias = (None if t is None else t.to(wide.dtype) for t in (weight, bias))
    y = F.layer_norm(wide, (s.shape[-1],), weight, bias, eps).to(_norm.output_dtype(x))
    return y if residual is None else (y, s)


def _plain(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    shape = (x.shape[-1],)
    # In x's dtype torch would sum the gradients of wider parameters; of one row there is nothing to sum.
    if weight is None or weight.dtype is x.dtype or x.numel() == shape[0] or not _dense.needs_grad(weight, bias):
        return torch.layer_norm(x, shape, weight, bias, eps)
    if not x.is_floating_point():
        raise TypeError("torch.layer_norm does not take these")
    wide = torch.promote_types(x.dtype, weight.dtype)
    weight, bias = weight.to(wide), None if bias is None else bias.to(wide)
    return torch.layer_norm(x.to(wide), shape, weight, bias, eps).to(x.dtype)


@torch.library.register_fake("bigmodel_fast::layer_norm_fwd")
def _(x, weight, bias, residual, eps, dtype):
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    s = x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), s, mean, rstd


@torch.library.register_fake("bigmodel_fast::layer_norm_bwd")
def _(grad_y, grad_sum, sum, weight, mean, rstd, narrow, seed=None, dropout_p=0.0):
    grad_narrow = sum.new_empty(sum.shape if narrow else 0, dtype=torch.bfloat16)
    grad_weight, grad_bias = (sum.new_empty(sum.shape[-1], dtype=torch.float32) for _ in range(2))
    return sum.new_empty(sum.shape), grad_narrow, grad_weight, grad_bias


@torch.library.register_fake("bigmodel_fast::layer_norm_twice_fwd")
def _(x, weight, bias, eps):
    rows = x.numel() // x.shape[-1] if x.shape[-1] else 0
    mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.bfloat16), mean, rstd


class _LayerNorm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, residual, eps, dtype):
        return torch.ops.bigmodel_fast.layer_norm_fwd(x, weight, bias, residual, eps, dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, residual, _, _ = inputs
        _, s, mean, rstd = output
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, residual, weight, bias))
        ctx.mark_non_differentiable(mean, rstd, *([s] if residual is None else []))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if residual is None else s, weight, mean, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_sum, *_):
        s, weight, mean, rstd = ctx.saved_tensors
        x_dtype, residual_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if grad_y is None:
            grad_y = torch.zeros_like(s)
        narrow = s.dtype == torch.float32 and torch.bfloat16 in (x_dtype, residual_dtype)
        grad, grad_narrow, grad_weight, grad_bias = torch.ops.bigmodel_fast.layer_norm_bwd(
            grad_y, grad_sum, s, weight, mean, rstd, narrow
        )
        x_grad, residual_grad = (t and (grad if t == s.dtype else grad_narrow) for t in (x_dtype, residual_dtype))
        weight_grad = weight_dtype and grad_weight.to(weight_dtype)
        bias_grad = bias_dtype and grad_bias.to(bias_dtype)
        return x_grad, weight_grad, bias_grad, residual_grad, None, None


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float = 1e-5, residual: Tensor | None = None
):
    """Layer norm over the last dimension, of x or of x + residual.

    Args:
        x: [..., width], any strides.
        weight, bias: [width] or None; may be float32 with a bfloat16 x.
        eps: added to the variance.
        residual: as x in shape; its dtype may differ.

    Returns:
        The normed tensor in x's dtype (bfloat16 within an autocast region of bfloat16); with a residual, a pair of it
        and of x + residual in their promoted dtype.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices do not fit together.
    """
    if residual is None and (y := _norm.small("layer_norm", _plain, x, weight, bias, eps)) is not None:
        return y
    _checks.floating("layer_norm", x=x, **_checks.given(weight=weight, bias=bias, residual=residual))
    if x.dim() == 0:
        raise ValueError(f"layer_norm: x must be [..., width], got {_checks.describe(x)}")
    _checks.shape("layer_norm", "weight", weight, (x.shape[-1],), "(x's last dimension)")
    _checks.shape("layer_norm", "bias", bias, (x.shape[-1],), "(x's last dimension)")
    _checks.shape("layer_norm", "residual", residual, tuple(x.shape), "(x's shape)")
    dtype = _norm.output_dtype(x)
    if not _dispatch.use_native("layer_norm", _norm.uncovered(dtype, x, residual, weight, bias), x):
        return reference(x, weight, bias, eps=eps, residual=residual)
    y, s, _, _ = apply(_LayerNorm, x, weight, bias, residual, eps, dtype)
    return y if residual is None else (y, s)

"""rms_norm: y = s / sqrt(mean(s^2) + eps) * weight with s = x + residual (Zhang and Sennrich 2019)."""

import torch
from torch import Tensor


def reference(x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None):
    """Plain torch; y in x's dtype, the sum in the promoted dtype of x and residual."""
    s = x if residual is None else x.to(torch.promote_types(x.dtype, residual.dtype)) + residual
    compute = torch.promote_types(torch.promote_types(s.dtype, weight.dtype), torch.float32)
    wide = s.to(compute)
    y = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(compute)).to(x.dtype)
    return y if residual is None else (y, s)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-6, residual: Tensor | None = None):
    return reference(x, weight, eps=eps, residual=residual)

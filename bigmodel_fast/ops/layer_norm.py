"""layer_norm: y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias with s = x + residual (Ba et al. 2016)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float = 1e-5, residual: Tensor | None = None):
    """Plain torch; y in x's dtype, the sum in the promoted dtype of x and residual."""
    s = x if residual is None else x.to(torch.promote_types(x.dtype, residual.dtype)) + residual
    compute = torch.promote_types(s.dtype, weight.dtype)
    y = F.layer_norm(s.to(compute), (s.shape[-1],), weight.to(compute), None if bias is None else bias.to(compute), eps)
    y = y.to(x.dtype)
    return y if residual is None else (y, s)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, *, eps: float = 1e-5, residual: Tensor | None = None):
    return reference(x, weight, bias, eps=eps, residual=residual)

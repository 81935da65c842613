"""layer_norm on NVIDIA GPUs: y = (s - mean) rstd w + b with s = x + residual. The kernels are in `_norm.py`."""

import torch
from torch import Tensor

from . import _norm


def layer_norm_fwd(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, eps: float, dtype: torch.dtype
):
    return _norm.forward(x, weight, bias, residual, eps, dtype, centered=True)


def layer_norm_bwd(
    grad_y: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    narrow: bool,
):
    return _norm.backward(grad_y, grad_sum, sum, weight, mean, rstd, narrow)


OPERATORS = {"layer_norm_fwd": layer_norm_fwd, "layer_norm_bwd": layer_norm_bwd}

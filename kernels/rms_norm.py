"""rms_norm on NVIDIA GPUs: y = s rsqrt(mean(s^2) + eps) w with s = x + residual. The kernels are in `_norm.py`."""

import torch
from torch import Tensor

from . import _norm


def rms_norm_fwd(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float, dtype: torch.dtype):
    y, sums, _, rstd = _norm.forward(x, weight, None, residual, eps, dtype, centered=False)
    return y, sums, rstd


def rms_norm_bwd(grad_y: Tensor, grad_sum: Tensor | None, sum: Tensor, weight: Tensor, rstd: Tensor, narrow: bool):
    return _norm.backward(grad_y, grad_sum, sum, weight, None, rstd, narrow)[:3]


OPERATORS = {"rms_norm_fwd": rms_norm_fwd, "rms_norm_bwd": rms_norm_bwd}

"""What layer_norm and rms_norm share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from . import _checks


def output_dtype(x: Tensor) -> torch.dtype:
    """Autocast's within its region, else x's."""
    return _checks.autocast_dtype(x) or x.dtype


def small(op: str, function: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor | None:
    """function(x, *args), torch's own norm, if x is small and comes in the output's dtype; else None."""
    if not isinstance(x, Tensor) or (_checks.in_cpu_autocast() and x.dtype is not torch.get_autocast_dtype("cpu")):
        return None
    return _dispatch.small(op, function, x, x.numel(), x, *args)


def uncovered(dtype: torch.dtype, x: Tensor, residual: Tensor | None, *parameters: Tensor | None) -> str | None:
    """Why no kernel takes these tensors together, for an output of `dtype`; None if one does."""
    reason = _dispatch.unsupported(x, residual, *parameters)
    if reason is None and dtype is torch.float16 and x.is_cpu:
        reason = "no kernel for torch.float16"
    if residual is not None and residual.dtype != x.dtype and torch.float16 in (x.dtype, residual.dtype):
        reason = reason or "float16 with a residual of another dtype"
    return reason

"""Gradient clipping by the norm of all gradients together."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from . import _fused


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of this norm are to be multiplied by; NaN for a NaN norm, as torch has it."""
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor >= 1.0 else factor


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor, max_norm: float, *, error_if_nonfinite: bool = False
) -> Tensor:
    """Scales the gradients so that their Euclidean norm is at most `max_norm`; as torch.nn.utils.clip_grad_norm_.

    Of gradients in shards (DTensors, as FSDP2 makes them) the norm is that of the whole ones; every process calls it.

    Args:
        parameters: whose .grad is clipped, in place; those without one are passed over.
        max_norm: the bound.
        error_if_nonfinite: raise RuntimeError for a norm that is NaN or infinite, before anything is scaled.

    Returns:
        The norm before clipping, float32.
    """
    parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    with_grad = [p for p in parameters if p.grad is not None]
    reason = _fused.unsupported({}, with_grad, ())
    first = with_grad[0] if with_grad else None
    if first is not None and first.is_cuda and error_if_nonfinite:
        reason = reason or "error_if_nonfinite on a GPU"
    if first is not None and first.is_cuda and any(hasattr(p.grad, "to_local") for p in with_grad):
        reason = reason or "shards of gradients on a GPU"
    if first is None or not _dispatch.use_native("clip_grad_norm_", reason, first):
        found: Any = torch.nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=error_if_nonfinite)
        return found.full_tensor() if hasattr(found, "full_tensor") else found
    grads = [p.grad for p in with_grad if p.grad is not None]
    if first.is_cuda:
        from ..kernels.optim import clip_grad_norm

        return clip_grad_norm(grads, max_norm)
    norm = _fused.norm_of_all(grads)
    if error_if_nonfinite and not norm < float("inf"):
        raise RuntimeError(f"clip_grad_norm_: the norm of the gradients is {norm}, so they cannot be clipped")
    factor = clip_factor(norm, max_norm)
    if factor != 1.0:
        torch.ops.bigmodel_fast.grad_scale_(_fused.local(grads), factor)
    return torch.tensor(norm)

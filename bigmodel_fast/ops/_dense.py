"""What linear, mlp and gated_mlp share: checks, operands as the kernels take them, and when to save for backward."""

import math

import torch
from torch import Tensor

from . import _checks


def check_weight(op: str, name: str, weight: Tensor, out: int | None, width: int, why: str) -> None:
    """`weight` is [out, width], or [any, width] where out is None."""
    _checks.ndim(op, name, weight, 2, "[out, in]")
    if weight.shape[1] != width or (out is not None and weight.shape[0] != out):
        rows = "out" if out is None else out
        raise ValueError(f"{op}: {name} must have shape [{rows}, {width}] {why}, got {_checks.describe(weight)}")


def check_input(op: str, x: Tensor) -> None:
    """`x` has at least one dimension."""
    if x.dim() == 0:
        raise ValueError(f"{op}: x must be [..., in], got {_checks.describe(x)}")


def operands(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """x as autocast wants it, then the weights: kept as they are where the kernel converts them, else in x's dtype."""
    x = x.to(_checks.autocast_dtype(x) or x.dtype)
    keep = x.dtype is torch.bfloat16
    return x, *(w if keep and w.dtype is torch.float32 else w.to(x.dtype) for w in weights)


def rows(t: Tensor) -> Tensor:
    """`t` as [rows, width] with contiguous rows, without a copy where its strides allow it."""
    t = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    return t if t.stride(-1) == 1 or t.shape[-1] < 2 else t.contiguous()


def wide(bias: Tensor | None) -> Tensor | None:
    """A bias as kernels read it: contiguous float32."""
    return None if bias is None else bias.to(torch.float32).contiguous()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether backward may be asked for, so that forward has to save for it."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)

"""What linear, mlp and gated_mlp share: checks, operands as the kernels take them, when to save for backward, and what
is done to an output before it is stored (dropout and a residual), which is also an operator of its own.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _dispatch
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
    if t.dim() != 2:
        t = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    return t if t.stride(-1) == 1 or t.shape[-1] < 2 else t.contiguous()


def shaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """`y` in another shape, but no view to autograd: whoever gets it from a function may change it in place."""
    return torch.ops.aten._unsafe_view.default(y, shape)


def wide(bias: Tensor | None) -> Tensor | None:
    """A bias as kernels read it: contiguous float32."""
    if bias is None or (bias.dtype is torch.float32 and bias.is_contiguous()):
        return bias
    return bias.to(torch.float32).contiguous()


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether backward may be asked for, so that forward has to save for it."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_finish(op: str, name: str, p: float, residual: Tensor | None, shape: tuple[int, ...]) -> None:
    """A probability to drop, and a residual of the output's shape."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"{op}: {name} must lie in [0, 1], got {p!r}")
    _checks.shape(op, "residual", residual, shape, "(the output's)")


def draw_seed(p: float, device: torch.device) -> Tensor | None:
    """What the choices of one call follow from; a tensor, so that a compiled graph draws a new one each time."""
    return torch.randint(1 << 62, (1,), dtype=torch.int64, device=device) if p > 0 else None


def finished_dtype(x: Tensor, residual: Tensor | None) -> torch.dtype:
    """float32 where the residual is, else x's."""
    return torch.float32 if residual is not None and residual.dtype is torch.float32 else x.dtype


def finish(y: Tensor, p: float, residual: Tensor | None) -> Tensor:
    """Plain torch."""
    y = F.dropout(y, p) if p > 0 else y
    return y if residual is None else residual + y


def before_finish(dy: Tensor, seed: Tensor | None, p: float, dtype: torch.dtype) -> Tensor:
    """The gradient of what was dropped from, as contiguous rows of `dtype`."""
    dy = rows(dy)
    if seed is None:
        return dy.to(dtype).contiguous()
    return torch.ops.bigmodel_fast.dropout_fwd(dy, seed, p, None, dtype)


def uncovered_on_cuda(op: str, x: Tensor, residual: Tensor | None, dropout_p: float, *weights: Tensor) -> str | None:
    """Why CUDA C++ has no kernel for this call of mlp or gated_mlp; None if it has, or if it is not asked for."""
    if not x.is_cuda or _dispatch.cuda_backend(op) != "native":
        return None
    if x.element_size() != 2:
        return f"no CUDA C++ kernel for {x.dtype}"
    if residual is not None or dropout_p > 0:
        return "no CUDA C++ kernel with a residual or dropout"
    return "a size of 0" if any(t.numel() == 0 for t in (x, *weights)) else None


def before_activation(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b as rows, for a backward that was not left it."""
    x, weight = rows(x), rows(weight)
    if x.is_cuda and _dispatch.cuda_backend(op) == "native":
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return torch.ops.bigmodel_fast.linear_fwd(x, weight, wide(bias), "none", False)[0]

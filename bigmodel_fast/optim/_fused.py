"""Which steps the kernels take over, and the states they work on."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch, _library  # noqa: F401  (loads the native operators)


def unsupported(group: dict[str, Any], parameters: Iterable[Tensor], options: tuple[str, ...]) -> str | None:
    """Why the kernel does not take this group of parameters with gradients; None if it does."""
    for option in options:
        if group.get(option):
            return f"no kernel for {option}"
    for t in (t for p in parameters for t in (p, p.grad) if t is not None):
        if t.dtype is torch.float32 and t.is_cpu and t.layout is torch.strided and t.is_contiguous():
            continue  # almost all, and there may be thousands
        if t.layout is not torch.strided:
            return "no kernel for sparse gradients"
        if (reason := _dispatch.unsupported(t)) is not None:
            return reason
        if not t.is_contiguous():
            return "a parameter or gradient is not contiguous"
    return None


def all_with_gradients(groups: Iterable[dict[str, Any]]) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """The groups that have something to do, each with its parameters that have a gradient."""
    pairs = ((group, [p for p in group["params"] if p.grad is not None]) for group in groups)
    return [(group, parameters) for group, parameters in pairs if parameters]


def first(groups: Iterable[tuple[dict[str, Any], list[Tensor]]]) -> Tensor | None:
    """A parameter with a gradient, by which the device is known; None if there is none."""
    return next((p for _, parameters in groups for p in parameters), None)

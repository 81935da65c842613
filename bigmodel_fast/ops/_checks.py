"""Argument checks shared by the operators. Each error names the argument, what came and what was expected."""

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "relu2")


def describe(t: object) -> str:
    """How an error message shows an argument."""
    if isinstance(t, Tensor):
        return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} on {t.device}"
    return repr(t)


def floating(op: str, **tensors: Tensor | None) -> None:
    """Each is a floating-point tensor or None, and all are on one device."""
    device = None
    for name, t in tensors.items():
        if t is None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
        if not t.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {describe(t)}")
        if device is None:
            device = t.device
        elif t.device != device:
            raise ValueError(f"{op}: {name} must be on {device} like the arguments before it, got {describe(t)}")


def shape(op: str, name: str, t: Tensor | None, expected: tuple[int, ...], why: str = "") -> None:
    """`t` (if given) has exactly this shape."""
    if t is not None and tuple(t.shape) != expected:
        raise ValueError(f"{op}: {name} must have shape {list(expected)}{' ' + why if why else ''}, got {describe(t)}")


def ndim(op: str, name: str, t: Tensor, expected: int, layout: str) -> None:
    """`t` has this many dimensions."""
    if t.dim() != expected:
        raise ValueError(f"{op}: {name} must be {layout}, got {describe(t)}")


def choice(op: str, name: str, value: object, allowed: tuple) -> None:
    """`value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, allowed))}, got {value!r}")


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """The dtype of the active autocast region on t's device, None outside of one or for float64."""
    if t.dtype is not torch.float64 and torch.is_autocast_enabled(t.device.type):
        return torch.get_autocast_dtype(t.device.type)
    return None


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Activations as the active autocast region wants them; unchanged outside of one."""
    return tuple(t if t is None or (dtype := autocast_dtype(t)) is None else t.to(dtype) for t in tensors)

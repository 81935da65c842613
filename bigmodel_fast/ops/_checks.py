"""Argument checks shared by the operators. Each error names the argument, what came and what was expected."""

import math

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "relu2")


def describe(t: object) -> str:
    """How an error message shows an argument."""
    if isinstance(t, Tensor):
        return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)} on {t.device}"
    return repr(t)


def given(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Those that are not None: the optional arguments a caller has passed."""
    return {name: t for name, t in tensors.items() if t is not None}


def floating(op: str, **tensors: Tensor) -> None:
    """Each is a floating-point tensor, and all are on one device."""
    device = None
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {None if t is None else type(t).__name__}")
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


def loss_options(op: str, label_smoothing: float, softcap: float | None, reduction: str) -> None:
    """The options that cross_entropy and linear_cross_entropy share."""
    choice(op, "reduction", reduction, ("mean", "sum", "none"))
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing must lie in [0, 1], got {label_smoothing!r}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap must be positive, got {softcap!r}")


def targets(op: str, target: Tensor, rows: Tensor, classes: int, ignore_index: int) -> None:
    """`target` holds one int64 for each row of `rows` [..., any]: a class in [0, classes), or ignore_index."""
    if isinstance(target, Tensor) and target.dtype is torch.int64:
        shape(op, "target", target, tuple(rows.shape[:-1]), "(one class for each row)")
    class_numbers(op, "target", target, rows, classes, ignore_index)


def class_numbers(op: str, name: str, t: Tensor, beside: Tensor, classes: int, ignore_index: int | None = None) -> None:
    """`t` holds int64, on the device of `beside`: classes in [0, classes), or ignore_index."""
    if not isinstance(t, Tensor) or t.dtype is not torch.int64:
        raise TypeError(f"{op}: {name} must be a tensor of int64 class numbers, got {describe(t)}")
    if t.device != beside.device:
        raise ValueError(f"{op}: {name} must be on {beside.device} like the arguments before it, got {describe(t)}")
    if t.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return  # reading values would wait for the device or break the graph; the kernels check for themselves
    at = torch.ops.bigmodel_fast.find_bad_target(t, classes, 0 if ignore_index is None else ignore_index)
    if at >= 0:
        allowed = f"[0, {classes})" + (f" or ignore_index={ignore_index}" if ignore_index is not None else "")
        raise IndexError(
            f"{op}: {name} must hold classes in {allowed}, got {t.reshape(-1)[at].item()} at position {at}"
        )


def in_cpu_autocast() -> bool:
    """As torch.is_autocast_enabled("cpu"), in a third of its time where there is no autocast at all."""
    return torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled("cpu")


def autocast_dtype(t: Tensor) -> torch.dtype | None:
    """The dtype of the active autocast region on t's device, None outside of one or for float64."""
    device = "cpu" if t.is_cpu else t.device.type  # whose name is slow to come by
    if t.dtype is not torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Activations as the active autocast region wants them; unchanged outside of one."""
    return tuple(t if t is None or (dtype := autocast_dtype(t)) is None else t.to(dtype) for t in tensors)

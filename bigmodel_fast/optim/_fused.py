"""Which steps the kernels take over, and the states they work on."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch, _library  # noqa: F401  (loads the native operators)

_WHOLE = (Tensor, torch.nn.Parameter)  # types that are no shards; asking a tensor for what it lacks takes long


def unsupported(group: dict[str, Any], parameters: Iterable[Tensor], options: tuple[str, ...]) -> str | None:
    """Why the kernel does not take this group of parameters with gradients; None if it does."""
    for option in options:
        if group.get(option):
            return f"no kernel for {option}"
    for t in local([t for p in parameters for t in (p, p.grad) if t is not None]):
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


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The part of each that this process holds: of a DTensor its shard, any other tensor itself."""
    return [t if type(t) in _WHOLE else _shard(t) for t in tensors]


def _shard(t: Any) -> Tensor:
    return t.to_local() if hasattr(t, "to_local") else t


def norm_of_all(grads: Iterable[Tensor]) -> float:
    """The Euclidean norm of gradients together, on CPU; of DTensors the whole ones count, whoever holds what.

    Raises:
        NotImplementedError: a DTensor whose values are sums still to be made (placement Partial).
    """
    whole: list[Tensor] = []
    shards: dict[tuple[Any, tuple[int, ...]], list[Tensor]] = {}
    grad: Any  # a Tensor or a DTensor
    for grad in grads:
        if not hasattr(grad, "to_local"):
            whole.append(grad)
            continue
        if any(p.is_partial() for p in grad.placements):
            raise NotImplementedError("clip_grad_norm: a gradient has placement Partial; redistribute it")
        split = tuple(dim for dim, p in enumerate(grad.placements) if p.is_shard())
        shards.setdefault((grad.device_mesh, split), []).append(grad.to_local())
    norm = torch.ops.bigmodel_fast.grad_norm(whole) if whole else 0.0
    squares = norm * norm
    for (mesh, split), parts in shards.items():
        norm = torch.ops.bigmodel_fast.grad_norm(parts)
        square = torch.tensor(norm * norm, dtype=torch.float64)
        for dim in split:
            torch.distributed.all_reduce(square, group=mesh.get_group(dim))
        squares += square.item()
    return math.sqrt(squares) if shards else norm

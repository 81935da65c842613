"""Attention with its projections, and what a caller does with a module's output done within its last product.

Shapes: B sequences, S tokens, H heads, D a head's width.
"""

from typing import Any

from torch import Tensor, nn

from .. import ops
from ..ops._heads import project_heads
from . import interface, packing, swap
from .layers import Finish, within


def linears(module: Any, names: tuple[str, ...]) -> str | None:
    """Why the work of a module's dense layers cannot be done by it."""
    children = tuple((name, module._modules.get(name), nn.Linear.forward) for name in names)
    return swap.first_not_plain(module, children)


def cached(kwargs: dict[str, Any]) -> bool:
    """Whether attention was given a cache of keys and values."""
    return any(kwargs.get(name) is not None for name in ("cache", "past_key_values"))


def project(x: Tensor, layers: list[Any], head_dim: int) -> tuple[Tensor, ...]:
    """What dense layers make of x, as heads [B, H, S, D] of each."""
    return project_heads(x, [layer.weight for layer in layers], [layer.bias for layer in layers], head_dim)


def attend(
    module: Any,
    names: tuple[str, str, str],
    head_dim: int,
    x: Tensor,
    mask: Tensor | None,
    *,
    memory: Tensor | None = None,
    first: bool = False,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of x, or of the first token of each sequence alone, to x or to a memory.

    Args:
        module: has the dense layers `names` for queries, keys and values, and a `scaling`.
        head_dim: D.
        x: [B, S, width].
        mask: transformers', or that of a packed batch.
        memory: [B, S of the memory, width].
        first: only the first tokens ask.
        options: those of interface.attention_forward.

    Returns:
        [B, S, H D], and the weights where they are asked for.
    """
    query, key, value = (module._modules[name] for name in names)
    if first or memory is not None:
        (q,) = project(packing.first_tokens(x, mask) if first else x, [query], head_dim)
        k, v = project(x if memory is None else memory, [key, value], head_dim)
        mask = interface.first_query(mask) if first else mask
    else:
        q, k, v = project(x, [query, key, value], head_dim)
    y, weights = interface.attention_forward(module, q, k, v, mask, scaling=module.scaling, **options)
    return y.flatten(2), weights


def finished(module: Any, finish: Finish, *args: Any, **kwargs: Any) -> Any:
    """A module's output (or the first of its outputs) finished: in its last product if its recipe does so."""
    if getattr(module, "finishes", False) and swap.is_fast(module) and not interface.watched(module):
        return module(*args, **kwargs, bmf_finish=finish)
    y = module(*args, **kwargs)
    return (finish.after(y[0]), *y[1:]) if isinstance(y, tuple) else finish.after(y)


def finished_linear(layer: Any, x: Tensor, finish: Finish | None, dropout_p: float = 0.0) -> Tensor:
    """A dense layer, then a dropout of the module's own, then what its caller does."""
    return within(finish, dropout_p, lambda **options: ops.linear(x, layer.weight, layer.bias, **options))

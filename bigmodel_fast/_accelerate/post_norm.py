"""Encoder layers with norms behind their sums (BERT's, DistilBERT's) as one function to autograd."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops._checks import ACTIVATIONS
from ..ops._encoder_layer import Shape, Weights, encoder_layer
from . import interface, packing, swap
from .unpad import FIRST

_UNREAD = ("position_ids", "num_items_in_batch", "return_dict", "use_cache")  # given to layers that do not read them


class Parts(NamedTuple):
    """The modules that do the work of a layer, each accelerated, and those that only call them."""

    attention: Any  # accelerated, with `scaling` and `is_causal`
    head_dim: int
    dense: tuple[Any, ...]  # query, key, value, out, up, down
    norms: tuple[Any, Any]
    dropouts: tuple[nn.Module | None, ...]  # of attention's weights, of its output, of the MLP's
    callers: tuple[Any, ...]  # and the module of the activation, if it is one
    activation: str


def _refused(parts: Parts) -> bool:
    """Whether someone watches or replaces a part."""
    if parts.attention.is_causal or not interface.enabled(parts.attention):
        return True
    for m in parts.callers:
        if isinstance(m, nn.Module) and interface.watched(m):
            return True
    for modules, kind in ((parts.dense, nn.Linear), (parts.norms, nn.LayerNorm), (parts.dropouts, nn.Dropout)):
        for m in modules:
            if m is not None and swap.not_plain(m, kind.forward):
                return True
    return not all(swap.is_fast(m) for m in parts.norms)


def run(parts: Parts, x: Tensor, mask: Tensor | None, given: dict[str, Any]) -> Tensor | None:
    """The layer's output for x [B, S, width] and a mask of transformers or of a packed batch; None: call the parts.

    given: other arguments of the layer's forward; with FIRST only the first token of each sequence is asked for.
    """
    if not x.is_cpu or torch.compiler.is_compiling():
        return None
    given = dict(given)
    first = given.pop(FIRST, False)
    if any(value is not None and value is not False and name not in _UNREAD for name, value in given.items()):
        return None
    sight = None if mask is None else interface.sight_of(mask)
    starts = packing.boundaries(mask)
    if mask is not None and starts is None and (sight is None or sight["is_causal"] or sight["window"] is not None):
        return None
    if parts.activation not in ACTIVATIONS or interface.weights_wanted(given) or _refused(parts):
        return None
    norm1, norm2 = parts.norms
    # None of what is not there, or computed by a parametrization: encoder_layer takes no such weight.
    weights = [layer._parameters.get(name) for name in ("weight", "bias") for layer in parts.dense]
    weights += [norm._parameters.get(name) for norm in parts.norms for name in ("weight", "bias")]
    shape = Shape(
        head_dim=parts.head_dim,
        scale=parts.attention.scaling,
        activation=parts.activation,
        eps1=norm1.eps,
        eps2=norm2.eps,
        attention_dropout=_probability(parts.dropouts[0], parts.attention),
        dropout1=_probability(parts.dropouts[1]),
        dropout2=_probability(parts.dropouts[2]),
    )
    lengths = None if sight is None else sight["key_lengths"]
    return encoder_layer(x, Weights._make(weights), shape, starts=starts, lengths=lengths, first=first)


def _probability(dropout: Any, module: Any = None) -> float:
    """Of a dropout at work: while it is training, or the module that reads its probability."""
    return dropout.p if dropout is not None and (module or dropout).training else 0.0

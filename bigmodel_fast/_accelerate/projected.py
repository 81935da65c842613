"""A recipe for attention of transformers models by three dense layers: ViT's, CLIP's, Whisper's, wav2vec2's and others.

No class is listed. A forward is known by what it hands to transformers' attention function, by what it makes of the
answer, and by what it leaves in a cache: a small copy of the module is called with a function that only takes notes.
"""

import inspect
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from . import interface, probe, swap
from .layers import Finish
from .projections import finished_linear, linears, project
from .swap import Fast, plan

_INPUTS, _OUTPUTS = ("q_proj", "k_proj", "v_proj"), ("out_proj", "o_proj")
_HEADS, _HEAD_WIDTH = 2, 3  # of the small copy
_WIDTH = _HEADS * _HEAD_WIDTH
_SHAPE = {"num_heads": _HEADS, "num_attention_heads": _HEADS, "head_dim": _HEAD_WIDTH, "embed_dim": _WIDTH}
_SCALES = {"scaling": 0.3, "scale": 0.7}  # attributes, and what they are in the small copy
_DROPOUTS = {"attention_dropout": 0.4, "dropout": 0.2}
_KNOWN = ("hidden_states", "attention_mask", "key_value_states", "cache", "output_attentions")
_NAME, _NOTES = "bigmodel_fast_notes", "_bmf_notes"


class FastProjectedAttention(Fast):
    """Queries, keys and values by one product (in cross attention keys and values), then attention."""

    area = "attention"
    finishes = True

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        output = next((name for name in _OUTPUTS if name in module._modules), None)
        if output is None or "config" not in module.__dict__ or "transformers.modeling_utils" not in sys.modules:
            return None
        names = (*_INPUTS, output)
        parameters = inspect.signature(swap.original_class(module).forward).parameters
        if set(module._modules) != set(names) or not {"hidden_states", "attention_mask"} <= set(parameters):
            return None
        if reason := linears(module, names):
            return reason
        found = _probe(module, output, "key_value_states" in parameters, "cache" in parameters)
        if not isinstance(found, dict):
            return found
        usual = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        named = [name for name, p in parameters.items() if p.kind in usual]
        return {**found, "output": output, "named": named[2:], "unknown": set(named[2:]) - set(_KNOWN)}

    def forward(self: Any, hidden_states: Tensor, *args: Any, bmf_finish: Finish | None = None, **kwargs: Any) -> Any:
        how = plan(self)
        given = {**dict(zip(how["named"], args, strict=False)), **kwargs}
        mask, states, cache = (given.pop(name, None) for name in ("attention_mask", "key_value_states", "cache"))
        unknown = [given.pop(name, None) for name in how["unknown"]]
        output = self._modules[how["output"]]
        usual = interface.enabled(self) and hidden_states.dim() == 3 and not any(_says(value) for value in unknown)
        if states is not None:
            usual = usual and how["cross"] and states.dim() == 3 and len(states) == len(hidden_states)
        if cache is not None:
            usual = usual and how["cached"] and is_empty(cache, self.layer_idx, states is not None)
        if not usual or not swap.note(self, linears(self, (*_INPUTS, how["output"]))):
            y, weights = super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
            return y if bmf_finish is None else bmf_finish.after(y), weights
        layers = [self.q_proj, self.k_proj, self.v_proj]
        if states is None:
            q, k, v = project(hidden_states, layers, self.head_dim)
        else:
            (q,) = project(hidden_states, layers[:1], self.head_dim)
            k, v = project(states, layers[1:], self.head_dim)
        if cache is not None:
            keep(cache, k, v, self.layer_idx, states is not None)
        p = getattr(self, how["dropout"]) if self.training and how["dropout"] else 0.0
        y, weights = interface.attention_forward(
            self, q, k, v, mask, dropout=p, scaling=getattr(self, how["scale"]), **given
        )
        return finished_linear(output, y.flatten(2), bmf_finish), weights


def _says(value: Any) -> bool:
    """Whether an option is more than its absence."""
    return value is not None and value is not False


# ---- caches ----


def _layers(cache: Any, layer: int, cross: bool, *, fill: bool = False) -> Any:
    """The cache that a layer of a decoder uses; with `fill`, cross attention will find it filled from now on."""
    if not hasattr(cache, "self_attention_cache"):
        return cache
    if cross and fill:
        cache.is_updated[layer] = True
    return cache.cross_attention_cache if cross else cache.self_attention_cache


def is_empty(cache: Any, layer: int, cross: bool) -> bool:
    """Whether a layer's keys are the first ones in a cache that grows."""
    if torch.compiler.is_compiling():
        return False
    used = _layers(cache, layer, cross)
    return type(used).__name__ == "DynamicCache" and used.get_seq_length(layer) == 0


def keep(cache: Any, key: Tensor, value: Tensor, layer: int, cross: bool) -> None:
    """Puts a layer's first keys and values into a cache, which takes copies of them."""
    _layers(cache, layer, cross, fill=True).update(key, value, layer)


# ---- what a forward is ----


def _take_notes(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
    """In place of attention: an answer that is nothing's attention."""
    module.__dict__[_NOTES].append((query, key, value, mask, options))
    return probe.draw(query.shape[0], query.shape[2], query.shape[1], query.shape[3]), None


def _probe(module: nn.Module, output: str, crosses: bool, caches: bool) -> dict[str, Any] | str | None:
    """The attributes for scale and dropout, and what else the forward can do; or why it is not known."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[_NAME] = _take_notes
    try:
        return _Probe(module, output).calls(crosses, caches)
    finally:
        del ALL_ATTENTION_FUNCTIONS[_NAME]


class _Probe:
    """A small copy of a module, and calls of its forward."""

    def __init__(self, module: nn.Module, output: str):
        self.children: dict[str, nn.Module] = {}
        for i, name in enumerate((*_INPUTS, output)):
            self.children[name] = layer = probe.linear(_WIDTH, _WIDTH)
            layer.weight.data, layer.bias.data = layer.weight.roll(i, 0), layer.bias.roll(i)
        self.output = self.children[output]
        self.small: Any = probe.small_copy(module, {}, self.children)
        changed = {name: value for name, value in {**_SHAPE, **_SCALES}.items() if name in module.__dict__}
        self.dropouts = {name: p for name, p in _DROPOUTS.items() if name in module.__dict__}
        self.small.__dict__.update(changed, **self.dropouts, config=SimpleNamespace(_attn_implementation=_NAME))

    def calls(self, crosses: bool, caches: bool) -> dict[str, Any] | str | None:
        quiet = self.call()
        if quiet is None:
            return None
        noisy = self.call(training=True)
        if not quiet or quiet["p"] not in (None, 0.0) or not noisy:
            return "its forward is not that of an attention that is known"
        dropout = next((name for name, p in self.dropouts.items() if p == noisy["p"]), None)
        if dropout is None and noisy["p"] not in (None, 0.0):
            return "where its dropout comes from is not known"
        return {
            "scale": quiet["scale"],
            "dropout": dropout,
            "cross": crosses and bool(self.call(states=probe.draw(2, 5, _WIDTH))),
            "cached": caches and self._keeps(False) and (not crosses or self._keeps(True)),
        }

    def call(self, *, training: bool = False, states: Tensor | None = None, cache: Any = None) -> Any:
        """{scale: attribute, p: dropout} of a call that is attention; False if it is not, None if it raises."""
        self.small.__dict__.update({_NOTES: [], "training": training})
        x, mask = probe.draw(2, 4, _WIDTH), probe.draw(2, 1, 4, 5 if states is not None else 4)
        more = {"key_value_states": states, "cache": cache}
        y = probe.run(self.small, x, attention_mask=mask, **{k: v for k, v in more.items() if v is not None})
        notes = self.small.__dict__[_NOTES]
        if y is None or len(notes) != 1:
            return None
        query, key, value, seen, options = notes[0]
        scaling, p = options.pop("scaling", None), options.pop("dropout", None)
        over = x if states is None else states
        q, k, v = (
            self.children[name](t).view(2, -1, _HEADS, _HEAD_WIDTH).transpose(1, 2)
            for name, t in zip(_INPUTS, (x, over, over), strict=True)
        )
        scales = (
            (name, s)
            for name, s in _SCALES.items()
            if (scaling == s and probe.same(query, q)) or (scaling == 1.0 and probe.same(query, q * s))
        )
        scale, _ = next(scales, (None, 0.0))
        answer = self.output(probe.draw(2, 4, _HEADS, _HEAD_WIDTH).flatten(2))
        usual = probe.same(key, k) and probe.same(value, v) and seen is mask and scale is not None
        usual = usual and not any(_says(value) for value in options.values())
        usual = usual and isinstance(y, tuple) and len(y) == 2 and probe.same(y[0], answer) and y[1] is None
        return {"scale": scale, "p": p} if usual else False

    def _keeps(self, cross: bool) -> bool:
        """Whether an empty cache is used, and left, as `keep` does it."""
        from transformers import DynamicCache, EncoderDecoderCache

        cache, expected = (EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2))
        layer = getattr(self.small, "layer_idx", None)
        states = probe.draw(2, 5, _WIDTH) if cross else None
        if layer is None or not self.call(states=states, cache=cache):
            return False
        k, v = self.small.__dict__[_NOTES][0][1:3]
        keep(expected, k, v, layer, cross)
        pairs = zip(*((c.self_attention_cache, c.cross_attention_cache) for c in (cache, expected)), strict=True)
        return cache.is_updated == expected.is_updated and all(_same_cache(a, b, layer) for a, b in pairs)


def _same_cache(a: Any, b: Any, layer: int) -> bool:
    if a.get_seq_length(layer) == 0 or b.get_seq_length(layer) == 0:
        return a.get_seq_length(layer) == b.get_seq_length(layer)
    return all(probe.same(getattr(a.layers[layer], n), getattr(b.layers[layer], n)) for n in ("keys", "values"))

"""A recipe for self-attention in plain torch, of modules by any name: nanoGPT's, timm's, one's own.

Its dense layers are one for queries, keys and values together and one for the output, or four. What a module does with
them is found out by running its own forward on random weights in float64, as for MLPs.

Shapes: B sequences, S tokens, W width, H heads of D.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._heads import split_heads
from ..ops.attention import reference
from . import probe, swap
from .projections import linears, project
from .swap import Fast, plan

_B, _S = 2, 5  # of what it is tried on at first
_LONG, _LONGEST = 300, 1024  # and then: what is seen may be limited to so many, or to a number the module holds
_UNKNOWN = "an attention's dense layers, but not an attention that is known"


class FastSelfAttention(Fast):
    """Queries, keys and values by one product, then attention, then the output with its dropout."""

    area = "attention"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        children = dict(module.named_children())
        dense = {n: c for n, c in children.items() if swap.original_class(c).forward is nn.Linear.forward}
        others = [c for n, c in children.items() if n not in dense]
        if any(True for c in others for _ in c.parameters()) or any(True for p in module._parameters.values()):
            return None
        if swap.original_class(module).__module__.startswith("transformers."):
            return None
        found = _find(module, dense)
        if not isinstance(found, dict):
            return found
        return linears(module, found["layers"]) or dict(found)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        how = plan(self)
        reason = linears(self, how["layers"])
        dropouts = {place: self._modules[name] for place, name in how["dropouts"].items()}
        reason = reason or next((f"a dropout {why}" for d in dropouts.values() if (why := swap.watched(d))), None)
        usual = type(x) is Tensor and x.dim() == 3 and not any(a is not None for a in (*args, *kwargs.values()))
        if not usual or not swap.note(self, reason):
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        *inputs, output = (self._modules[name] for name in how["layers"])
        if how["kind"] == "four":
            q, k, v = project(x, inputs, output.in_features // how["heads"])
        else:
            q, k, v = _split(ops.linear(x, inputs[0].weight, inputs[0].bias), how["kind"], how["heads"])
        p = {place: swap.active_dropout(dropout) for place, dropout in dropouts.items()}
        y = ops.attention(q, k, v, is_causal=how["causal"], dropout_p=p.get("weights", 0.0))
        y = y.transpose(1, 2).flatten(2)
        return ops.linear(y, output.weight, output.bias, dropout_p=p.get("output", 0.0))


_last: list[Any] = []  # a description of the last module, and what was found: layers differ mostly by their weights


def _find(module: nn.Module, dense: dict[str, Any]) -> dict[str, Any] | str | None:
    described = _described(module)
    if not _last or not _equal(_last[0], described):
        _last[:] = described, _probe(module, dense)
    return _last[1]


def forget() -> None:
    """Lets go of what the last module held."""
    _last.clear()


def _described(module: nn.Module) -> tuple[Any, ...]:
    """All that a forward can depend on but weights: values, and objects that are compared by what they are."""
    attributes = {name: value for name, value in module.__dict__.items() if not name.startswith("_")}
    children = [
        (name, swap.original_class(child), *((n, p.shape) for n, p in child._parameters.items() if p is not None))
        for name, child in module.named_children()
    ]
    return swap.original_class(module), tuple(children), tuple(attributes.items()), tuple(module._buffers.items())


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
    return a is b or (type(a) is type(b) and isinstance(a, bool | int | float | str) and a == b)


def _split(y: Tensor, kind: str, heads: int) -> tuple[Tensor, ...]:
    """[B, S, 3 W] to three [B, H, S, D]; the three are either the slowest or within each head."""
    if kind == "three by heads":
        return split_heads(y.unflatten(-1, (3 * heads, -1)), [heads] * 3)
    return y.unflatten(-1, (heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)


def _probe(module: nn.Module, dense: dict[str, Any]) -> dict[str, Any] | str | None:
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in dense.items()}
    width = next(iter(shapes.values()), (0, 0))[1]
    together = sorted(shapes.values()) == [(width, width), (3 * width, width)]
    if not together and not (len(shapes) == 4 and set(shapes.values()) == {(width, width)}):
        return None
    counts = {n for n in module.__dict__.values() if type(n) is int and 0 < n <= width and width % n == 0}
    small: dict[str, Any] = {}
    for i, (name, (out, into)) in enumerate(shapes.items()):
        small[name] = layer = probe.linear(into, out)
        layer.weight.data = layer.weight.roll(i, 0) * (2 * into**-0.5)
        if dense[name].bias is None:
            layer._parameters["bias"] = None
    dropouts = {name: probe.Dropout() for name, c in module.named_children() if isinstance(c, nn.Dropout)}
    x = probe.draw(_B, _S, width)

    def run(x: Tensor, training: bool = False) -> Any:
        tried = probe.small_copy(module, {}, {**small, **dropouts})
        tried.training = training
        return probe.run(tried, x)

    y = run(x)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    given = {name: list(dropout.seen) for name, dropout in dropouts.items()}
    made = {name: layer(x) for name, layer in small.items()}
    for how in _ways(small, together, counts):
        if not probe.same(y, _compute(made, small, how)):
            continue
        if not probe.same(run(x, training=True), y):
            return "drops by other means than its children"
        for name, seen in given.items():
            places = {_place(t, y, how["heads"]) for t in seen}
            if len(seen) > 1 or None in places or places & set(how["dropouts"]):
                return "a dropout where attention has none"
            how["dropouts"].update(dict.fromkeys(places, name))
        for length in _lengths(module, width, how["heads"]):
            x = probe.draw(1, length, width)
            if isinstance(y := run(x), Tensor):
                made = {name: layer(x) for name, layer in small.items()}
                return how if probe.same(y, _compute(made, small, how)) else _UNKNOWN
        return "what it does with many tokens cannot be tried"
    return _UNKNOWN if together else None


def _lengths(module: nn.Module, width: int, heads: int) -> list[int]:
    """Twice as many tokens as a number says that it looks at, or, should that be the most it takes, as many.

    None where a limit may be too far away to be tried.
    """
    numbers = {n for n in module.__dict__.values() if type(n) is int} - {width, 3 * width, heads, width // heads}
    numbers |= {n for b in module._buffers.values() if b is not None for n in b.shape}
    known = [n for n in numbers if n > _S]
    if any(n > _LONGEST for n in known):
        return []
    return [max([_LONG, *(2 * n for n in known)]), *sorted(known, reverse=True)]


def _ways(small: dict[str, Any], together: bool, counts: set[int]) -> Iterator[dict[str, Any]]:
    """All that such a module may compute."""
    names = sorted(small, key=lambda name: -small[name].weight.shape[0])
    orders = [tuple(names)] if together else list(itertools.permutations(small))
    kinds = ("three by heads", "heads by three") if together else ("four",)
    for order, kind, heads, causal in itertools.product(orders, kinds, sorted(counts), (False, True)):
        yield {"layers": order, "kind": kind, "heads": heads, "causal": causal, "dropouts": {}}


def _place(seen: Tensor, y: Tensor, heads: int) -> str | None:
    """What a dropout was given: the weights of the softmax, or the output y."""
    if seen.shape == (_B, heads, _S, _S) and probe.same(seen.sum(-1), torch.ones_like(seen[..., 0])):
        return "weights"
    return "output" if probe.same(seen, y) else None


def _compute(made: dict[str, Tensor], small: dict[str, Any], how: dict[str, Any]) -> Tensor:
    """What comes of the dense layers' outputs in one of these ways."""
    *inputs, output = how["layers"]
    if how["kind"] == "four":
        q, k, v = (made[name].unflatten(-1, (how["heads"], -1)).transpose(1, 2) for name in inputs)
    else:
        q, k, v = _split(made[inputs[0]], how["kind"], how["heads"])
    return small[output](reference(q, k, v, is_causal=how["causal"]).transpose(1, 2).flatten(2))

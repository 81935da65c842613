"""What a module computes, found out by calling its own forward on small random weights in float64."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._activation import _FUNCTIONS

_WIDTH, _HIDDEN = 6, 10
_CLOSE = 1e-6  # some forwards compute in float32
_QUICK_GELU: dict[str, Callable[[Tensor], Tensor]] = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}
_EPS = (1e-5, 1e-6, 1e-8, 1e-12)  # of norms that say theirs in their forward only


def same(a: Any, b: Tensor) -> bool:
    """Whether a is a tensor equal to b, but for rounding in float32."""
    return isinstance(a, Tensor) and a.shape == b.shape and torch.allclose(a.double(), b, rtol=_CLOSE, atol=_CLOSE)


def run(module: nn.Module, *args: Any, method: str = "forward", **kwargs: Any) -> Any:
    """forward(*args, **kwargs) without hooks, or None if it raises: then it is not what it was taken for."""
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return getattr(type(module), method)(module, *args, **kwargs)
    except Exception:
        return None


def draw(*shape: int) -> Tensor:
    """The same random numbers each time, from a generator of its own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def linear(into: int, out: int) -> nn.Linear:
    """A dense layer of float64 with weights of its own."""
    layer = nn.Linear(into, out, dtype=torch.float64)
    layer.weight.data, layer.bias.data = draw(out, into), draw(out)
    return layer.requires_grad_(False)


def layer_norm(width: int) -> nn.LayerNorm:
    """A norm of float64 with weights of its own."""
    norm = nn.LayerNorm(width, dtype=torch.float64)
    norm.weight.data, norm.bias.data = draw(width), draw(width) + 1
    return norm.requires_grad_(False)


def activation(function: Callable | None) -> str | None:
    """The name under which ops know a function of one tensor."""
    if isinstance(function, nn.Module) and (
        any(True for _ in function.parameters()) or function._forward_hooks or function._forward_pre_hooks
    ):
        return None
    if function is None:
        return None
    x = torch.linspace(-6, 6, 97, dtype=torch.float64)
    try:
        with torch.no_grad():
            y = function(x.clone())
    except Exception:
        return None
    return next((name for name, known in _FUNCTIONS.items() if same(y, known(x))), None)


class Dropout(nn.Dropout):
    """Drops nothing, and remembers what it was given; whoever reads its p and drops by that is found out."""

    def __init__(self) -> None:
        super().__init__(0.5)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return x

    def places(self, *values: Tensor) -> list[int | None]:
        """Which of these values it was given, call by call; None for another one."""
        return [next((i for i, value in enumerate(values) if same(x, value)), None) for x in self.seen]


def small_copy(module: nn.Module, parameters: dict[str, Tensor], children: dict[str, nn.Module]) -> nn.Module:
    """A module of the same class and attributes, with other parameters and children, in eval mode; no hooks.

    Buffers are copies: a forward may write to them.
    """
    small: Any = nn.Module.__new__(type(module))  # not by its own, which may do more (FSDP2's does)
    small.__dict__ = {**module.__dict__, "training": False}
    small._parameters = {name: parameters.get(name) for name in module._parameters}  # type: ignore[misc]
    small._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    small._modules = {name: children.get(name, child) for name, child in module._modules.items()}
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        small.__dict__[kind] = {}
    return small


def norm(module: nn.Module) -> dict[str, Any] | None:
    """What a module of a weight [width], and maybe a bias, computes over the last dimension; None if it is no norm.

    Returns:
        kind (layer or rms), eps, offset (what is added to the weight), input_dtype (of the output for a bfloat16 input
        and float32 weights: the input's, or float32).
    """
    given = {name: p for name, p in module._parameters.items() if p is not None}
    width = len(given["weight"])
    parameters = {name: draw(width) + i for i, name in enumerate(given)}
    weight, bias = parameters["weight"], parameters.get("bias", torch.zeros(()))
    small = small_copy(module, parameters, {})
    inputs = [(draw(1, 4, width) + 1) * size for size in (1.0, 1e-3)]  # of the second, eps is no small part
    noisy = small_copy(module, parameters, {})
    noisy.training = True
    found = [run(small, inputs[0]), run(noisy, inputs[1])]
    own = [v for v in module.__dict__.values() if isinstance(v, float) and 0 < v < 0.1]
    for eps, offset, kind in itertools.product(dict.fromkeys((*own, *_EPS)), (0.0, 1.0), ("layer", "rms")):
        centred = [x - x.mean(-1, keepdim=True) if kind == "layer" else x for x in inputs]
        normed = [x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) for x in centred]
        if all(same(y, z * (weight + offset) + bias) for y, z in zip(found, normed, strict=True)):
            mixed = small_copy(module, {name: p.float() for name, p in parameters.items()}, {})
            y = run(mixed, inputs[0].bfloat16())
            return {"kind": kind, "eps": eps, "offset": offset, "input_dtype": y is None or y.dtype is torch.bfloat16}
    return None


def _role(layer: nn.Module, transposed: bool, into: int, out: int) -> nn.Module:
    weight = draw(out, into)
    small: Any = nn.Module.__new__(type(layer))
    small.__dict__ = {**layer.__dict__}
    bias = None if layer._parameters.get("bias") is None else draw(out)
    small._parameters = {"weight": weight.t().contiguous() if transposed else weight, "bias": bias}  # type: ignore
    if transposed:
        small.__dict__.update(nf=out, nx=into)
    for kind in ("_forward_hooks", "_forward_pre_hooks"):
        small.__dict__[kind] = {}
    return small


def _as_drawn(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters, of the kind that `draw` gives."""
    return {name: p.detach().cpu().double() for name, p in module._parameters.items() if p is not None}


def _linear(layer: nn.Module, transposed: bool, x: Tensor) -> Tensor:
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    return nn.functional.linear(x, weight.t() if transposed else weight, bias)  # type: ignore[union-attr, arg-type]


def mlp(
    module: nn.Module, layers: dict[str, nn.Module], transposed: bool, others: dict[str, nn.Module]
) -> tuple[str, Sequence[str], list[str], list[str]] | str | None:
    """How a module of two or three dense layers combines them.

    Returns:
        (activation, names of the layers in the order of ops.mlp or ops.gated_mlp, names of the dropouts after the
        activation, of those at the end); why it is another function of the dense layers (with `others`, its children
        with parameters, it always is); or None if it does not run as an MLP would.
    """
    dropouts = [name for name, child in module.named_children() if isinstance(child, nn.Dropout)]
    quiet: dict[str, Any] = {name: Dropout() for name in dropouts}
    quiet |= {name: small_copy(child, _as_drawn(child), {}) for name, child in others.items()}
    own = {name: p for name, p in _as_drawn(module).items() if p.numel() == 1}
    x, runs = draw(1, 4, _WIDTH), False
    for order in itertools.permutations(layers):
        *first, last = order
        small = {name: _role(layers[name], transposed, _WIDTH, _HIDDEN) for name in first}
        if len(first) == 2:  # the two must differ
            small[first[1]]._parameters["weight"] = draw(_HIDDEN + 1, _WIDTH)[1:].neg()  # type: ignore[assignment]
        small[last] = _role(layers[last], transposed, _HIDDEN, _WIDTH)
        for name in dropouts:
            quiet[name].seen.clear()
        y = run(small_copy(module, own, {**small, **quiet}), x)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            continue
        runs = True
        for function_name, function in {**_FUNCTIONS, **_QUICK_GELU}.items():
            hidden = function(_linear(small[first[0]], transposed, x))
            if len(first) == 2:
                hidden = hidden * _linear(small[first[1]], transposed, x)
            if others or own or not same(y, _linear(small[last], transposed, hidden)):
                continue
            found = [(name, place) for name in dropouts for place in quiet[name].places(hidden, y)]
            if any(place is None for _, place in found) or len({place for _, place in found}) < len(found):
                return "a dropout where an MLP has none"
            tried = small_copy(module, {}, {**small, **quiet})
            tried.training = True
            if not same(run(tried, x), y):
                return "drops by other means than its children"
            inner, outer = ([name for name, place in found if place == i] for i in range(2))
            return function_name, order, inner, outer
    if runs and (others or own):
        return f"{next(iter({**others, **own}))} has parameters"
    return f"{'two' if len(layers) == 2 else 'three'} dense layers, but not an MLP that is known" if runs else None

"""Recipes for single layers: dense layers, dropout, embeddings, norms, MLPs of any name."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from . import probe, swap
from .conv1d import conv1d, conv1d_mlp
from .swap import Fast, plan

QUICK_GELU = "quick_gelu"  # x sigmoid(1.702 x)


def _is_conv1d(module: nn.Module) -> bool:
    """transformers' dense layer with a weight [in, out]."""
    cls = swap.original_class(module)
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def dense_forward(module: nn.Module) -> Any:
    """The forward that a dense layer of this kind has; None for what is no dense layer."""
    if swap.original_class(module).forward is nn.Linear.forward:
        return nn.Linear.forward
    return swap.original_class(module).forward if _is_conv1d(module) else None


def weight_of(layer: Any) -> Tensor:
    """[out, in]."""
    return layer.weight.t() if _is_conv1d(layer) else layer.weight


class FastLinear(Fast):
    """y = x W^T + b."""

    area = "mlp"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if dense_forward(module) is not None:
            return {}
        return "a subclass of Linear with a forward of its own" if isinstance(module, nn.Linear) else None

    def forward(self: Any, x: Tensor) -> Tensor:
        if swap.unusual(self) or type(x) is not Tensor:
            return super().forward(x)  # type: ignore[misc]
        if _is_conv1d(self):
            return conv1d(x, self.weight, self.bias)
        return ops.linear(x, self.weight, self.bias)


class FastDropout(Fast):
    """No mask is stored."""

    area = "mlp"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if swap.original_class(module).forward is not nn.Dropout.forward:
            return None
        return "works in place" if getattr(module, "inplace", False) else {}

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if type(x) is not Tensor or not x.is_floating_point() or x.dim() == 0:
            return super().forward(x)  # type: ignore[misc]
        return ops.dropout(x, self.p)


class FastEmbedding(Fast):
    """Rows of a table, whose gradient is written once; the row of padding_idx has none."""

    area = "mlp"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not isinstance(module, nn.Embedding):
            return None
        if swap.original_class(module).forward is not nn.Embedding.forward:
            return "a subclass of Embedding with a forward of its own"
        return cls._unusual(module) or {}

    @staticmethod
    def _unusual(module: nn.Embedding) -> str | None:
        usual = module.max_norm is None and not module.sparse and not module.scale_grad_by_freq
        return None if usual else "max_norm, sparse or scale_grad_by_freq"

    def forward(self: Any, token: Tensor) -> Tensor:
        rows = self._rows(token)
        return super().forward(token) if rows is None else rows  # type: ignore[misc]

    def _rows(self: Any, token: Tensor) -> Tensor | None:
        """The rows of some tokens; None where the original has to look them up."""
        if swap.unusual(self) or type(token) is not Tensor or token.dtype is not torch.int64:
            return None
        out = ops.embedding(token, self.weight)
        if self.padding_idx is not None and out.requires_grad:
            padding = (token == self.padding_idx).unsqueeze(-1)
            if torch.compiler.is_compiling():  # a hook in a graph loses what the model writes to its attributes
                return torch.where(padding, out.detach(), out)
            if not padding.is_cpu or padding.any():  # elsewhere one would wait for the answer
                out.register_hook(lambda grad: grad.masked_fill(padding, 0))
        return out


class FastLayerNorm(Fast):
    """Over the last dimension; under autocast the output has the dtype of torch's: the input's, float32 on a GPU."""

    area = "norm"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not isinstance(module, nn.LayerNorm):
            return None
        if swap.original_class(module).forward is not nn.LayerNorm.forward:
            return "a subclass of LayerNorm with a forward of its own"
        return {} if len(module.normalized_shape) == 1 else "over several dimensions"

    def forward(self: Any, x: Tensor) -> Tensor:
        if swap.unusual(self) or type(x) is not Tensor or x.shape[-1:] != self.normalized_shape:
            return super().forward(x)  # type: ignore[misc]
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            x = x.float()
        with swap.without_autocast(x):
            return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


class FastNorm(Fast):
    """torch's RMSNorm, or any norm whose forward computes a LayerNorm or x / rms(x), times weight or 1 + weight."""

    area = "norm"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        original = swap.original_class(module)
        if original.forward is nn.RMSNorm.forward:
            weight = module._parameters["weight"]
            if weight is None or weight.dim() > 1:
                return "over several dimensions, or without weights"
            return {"kind": "rms", "eps": module.eps, "offset": 0.0, "input_dtype": True}
        if original.__module__.startswith("torch.nn.") or module._modules:
            return None
        named = "RMSNorm" in original.__name__ or original.__name__ == "T5LayerNorm"
        parameters = {name: p for name, p in module._parameters.items() if p is not None}
        shapes = {p.shape for p in parameters.values()}
        usual = (
            set(parameters) in ({"weight"}, {"weight", "bias"}) and len(shapes) == 1 and len(next(iter(shapes))) == 1
        )
        if not usual:
            return "no weight of one dimension, or other parameters beside it" if named else None
        found = probe.norm(module)
        return found or ("its forward does not compute a norm that is known" if "Norm" in original.__name__ else None)

    def forward(self: Any, x: Tensor) -> Tensor:
        if swap.unusual(self) or type(x) is not Tensor or x.shape[-1:] != self.weight.shape:
            return super().forward(x)  # type: ignore[misc]
        how, weight = plan(self), self.weight
        eps = torch.finfo(x.dtype).eps if how["eps"] is None else how["eps"]
        if how["offset"]:
            weight = weight.float() + how["offset"]
        if how["kind"] == "layer" and x.is_cuda and torch.is_autocast_enabled("cuda"):
            x = x.float()
        with swap.without_autocast(x):
            if not how["input_dtype"] and weight.dtype is torch.float32:
                x = x.float()  # those of Llama's kind give the weight's dtype
            if how["kind"] == "layer":
                return ops.layer_norm(x, weight, self._parameters.get("bias"), eps=eps)
            return ops.rms_norm(x, weight, eps=eps)


class Finish(NamedTuple):
    """What a caller does with the output of a module: dropout, then a residual."""

    residual: Tensor
    dropout_p: float = 0.0

    def after(self, y: Tensor) -> Tensor:
        return ops.dropout(y, self.dropout_p, residual=self.residual) if self.dropout_p else self.residual + y


def within(finish: Finish | None, dropout_p: float, product: Callable[..., Tensor]) -> Tensor:
    """product(dropout_p=, residual=), by which a module ends, with what its caller does in it."""
    if finish is None:
        return product(dropout_p=dropout_p)
    if dropout_p and finish.dropout_p:
        return finish.after(product(dropout_p=dropout_p))
    return product(dropout_p=dropout_p or finish.dropout_p, residual=finish.residual)


class FastMLP(Fast):
    """Two dense layers with an activation between them, or three of which one is a gate, and dropout."""

    area = "mlp"
    finishes = True

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        children = dict(module.named_children())
        layers = {name: child for name, child in children.items() if dense_forward(child) is not None}
        others = {name: c for name, c in children.items() if name not in layers and any(True for _ in c.parameters())}
        if len(layers) not in (2, 3) or len({_is_conv1d(c) for c in layers.values()}) > 1:
            return None
        if any(p.dim() > 1 for c in others.values() for p in c.parameters()):
            return None
        found = probe.mlp(module, layers, _is_conv1d(next(iter(layers.values()))), others)
        if not isinstance(found, tuple):
            return found
        activation, order, inner, outer = found
        if reason := swap.first_not_plain(module, _children(module, order)):
            return reason
        if len(order) == 3 and any(layers[name].bias is not None for name in order):
            return "a gated MLP with biases"
        if activation == QUICK_GELU and (len(order) == 3 or _is_conv1d(layers[order[0]])):
            return "an activation that is not known here"
        return {"activation": activation, "order": order, "inner": inner, "outer": outer}

    def forward(self: Any, x: Tensor, bmf_finish: Finish | None = None) -> Tensor:
        how = plan(self)
        reason = swap.first_not_plain(self, _children(self, how["order"]))
        others = ((name, c) for name, c in self._modules.items() if name not in how["order"] and c is not None)
        reason = reason or next((f"{name} {why}" for name, c in others if (why := swap.watched(c))), None)
        if type(x) is not Tensor:
            reason = f"called with a {type(x).__name__}"
        if not swap.note(self, reason):
            y = super().forward(x)  # type: ignore[misc]
            return y if bmf_finish is None else bmf_finish.after(y)
        layers = [self._modules[name] for name in how["order"]]
        inner = swap.active_dropout(*(self._modules[name] for name in how["inner"]))
        outer = swap.active_dropout(*(self._modules[name] for name in how["outer"]))

        def product(dropout_p: float, residual: Tensor | None = None) -> Tensor:
            return dense_mlp(x, layers, how["activation"], inner, dropout_p, residual)

        return within(bmf_finish, outer, product)


def dense_mlp(
    x: Tensor, layers: list[Any], activation: str, inner: float, outer: float, residual: Tensor | None = None
) -> Tensor:
    """dropout(second(dropout(activation(first(x))))) + residual; of three layers the first two are gate and up."""
    if activation == QUICK_GELU:
        first, second = layers
        y = _quick_gelu_mlp(x, first, second, inner)
        return ops.dropout(y, outer, residual=residual) if outer or residual is not None else y
    if len(layers) == 2 and all(_is_conv1d(layer) for layer in layers):
        return conv1d_mlp(x, layers, activation, inner, outer, residual)
    weights = [weight_of(layer) for layer in layers]
    if residual is x and torch.compiler.is_compiling():
        residual = x.view_as(x)  # dynamo takes no tensor twice
    finish: dict[str, Any] = {"dropout_p": outer, "residual": residual}
    if len(layers) == 3:
        if not inner:
            return ops.gated_mlp(x, *weights, activation=activation, **finish)
        hidden = ops.dropout(ops.linear(x, weights[0], activation=activation) * ops.linear(x, weights[1]), inner)
        return ops.linear(hidden, weights[2], **finish)
    first, second = layers
    if not inner:
        return ops.mlp(x, weights[0], first.bias, weights[1], second.bias, activation=activation, **finish)
    hidden = ops.linear(x, weights[0], first.bias, activation=activation, dropout_p=inner)
    return ops.linear(hidden, weights[1], second.bias, **finish)


def _quick_gelu_mlp(x: Tensor, first: Any, second: Any, inner: float) -> Tensor:
    """x sigmoid(c x) is silu(c x) / c: the input is multiplied by c and the output divided, which are narrow."""
    c, bias = 1.702, first.bias if first.bias is None else first.bias * 1.702
    if inner:
        hidden = ops.linear(x * c, first.weight, bias, activation="silu", dropout_p=inner)
        y = ops.linear(hidden, second.weight)
    else:
        y = ops.mlp(x * c, first.weight, bias, second.weight, None, activation="silu")
    return y / c if second.bias is None else torch.add(second.bias.to(y.dtype), y, alpha=1 / c)


def _children(module: Any, order: Any) -> tuple[tuple[str, nn.Module, Any], ...]:
    children = ((name, module._modules[name]) for name in order)
    return tuple((name, child, dense_forward(child) or nn.Linear.forward) for name, child in children)

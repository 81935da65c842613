"""Parts of a module in one operator: the parameters of plain parts are read, and any other part is called.

So whatever someone does to a part counts: an adapter or a quantised layer in its place, a hook, a parametrization.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from .. import ops
from ..ops._activation import activate
from .modules import Linear


def untouched(module: torch.nn.Module, *kinds: type) -> bool:
    """Whether a module is of one of these very classes, nobody watches it, and it does what its class does."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    if type(module) not in kinds or hooks or _has_any_global_hook():
        return False
    return "forward" not in module.__dict__ and module._compiled_call_impl is None


def plain(*layers: Any) -> bool:
    """Whether all of these are untouched dense layers, x W^T + b and nothing else."""
    for layer in layers:  # faster than all(), at each call of a model
        if not untouched(layer, torch.nn.Linear, Linear) or (type(layer) is Linear and layer.activation is not None):
            return False
    return True


def plain_gated(gate: Any, up: Any, down: Any) -> bool:
    """Whether these are the plain dense layers of a gated MLP, which operators have without biases."""
    if not plain(gate, up, down):
        return False
    gate, up, down = gate._parameters, up._parameters, down._parameters  # an attribute takes torch ten times as long
    return gate.get("bias") is up.get("bias") is down.get("bias") is None


def linear(
    x: Tensor, layer: Any, *, activation: str | None = None, dropout_p: float = 0.0, residual: Tensor | None = None
) -> Tensor:
    """dropout(activation(layer(x))) + residual."""
    if plain(layer):
        return ops.linear(x, layer.weight, layer.bias, activation=activation, dropout_p=dropout_p, residual=residual)
    y = activate(layer(x), activation)
    return ops.dropout(y, dropout_p, residual=residual) if dropout_p or residual is not None else y


def mlp(
    x: Tensor, up: Any, down: Any, *, activation: str, dropout_p: float = 0.0, residual: Tensor | None = None
) -> Tensor:
    """dropout(down(activation(up(x)))) + residual."""
    finish: dict[str, Any] = {"dropout_p": dropout_p, "residual": residual}
    if plain(up, down):
        return ops.mlp(x, up.weight, up.bias, down.weight, down.bias, activation=activation, **finish)
    return linear(linear(x, up, activation=activation), down, **finish)


def gated_mlp(x: Tensor, gate: Any, up: Any, down: Any, *, activation: str) -> Tensor:
    """down(activation(gate(x)) * up(x))."""
    if plain_gated(gate, up, down):
        return ops.gated_mlp(x, gate.weight, up.weight, down.weight, activation=activation)
    return linear(linear(x, gate, activation=activation) * linear(x, up), down)


def _plain_table(table: Any) -> bool:
    usual = untouched(table, torch.nn.Embedding) and table.padding_idx is None and table.max_norm is None
    return usual and not (table.sparse or table.scale_grad_by_freq)


def embedding(token: Tensor, table: Any) -> Tensor:
    """Rows of a table for tokens [...], int64: [..., width]."""
    return ops.embedding(token, table.weight) if _plain_table(table) else table(token)


def rows(table: Any, start: int, end: int, device: torch.device) -> Tensor:
    """Rows of a table from `start` to `end`, [end - start, width]."""
    return table.weight[start:end] if _plain_table(table) else table(torch.arange(start, end, device=device))


def tied(table: Any, classes: int, device: torch.device) -> Tensor:
    """The weight [classes, width] of an output layer tied to an embedding.

    Of a module that looks tokens up in another way (with an adapter, say) it is what that makes of each token.
    """
    if type(table).forward is torch.nn.Embedding.forward:
        return table.weight
    return table(torch.arange(classes, device=device))

"""ModernBERT (Warner et al. 2024): windows and all keys in turns, rotary positions, a gated MLP in two products."""

import sys
from typing import Any

from torch import Tensor, nn

from .. import ops
from ..ops._activation import activate
from ..ops._heads import split_heads
from . import interface, probe, swap
from .hugging_face import rotates_halves
from .layers import Finish, within
from .projections import finished, finished_linear, linears
from .swap import Fast, plan
from .unpad import FastStack


def _dropout_reason(module: Any, names: tuple[str, str], dropout: str) -> str | None:
    watched = swap.watched(module._modules[dropout])
    return linears(module, names) or (f"{dropout} {watched}" if watched else None)


class FastAttention(Fast):
    """Queries, keys and values rotated where they lie, attention, then a product with dropout and the residual."""

    area = "rotary"
    finishes = True

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not interface.is_class(module, ("ModernBertAttention",)):
            return None
        rotate = getattr(sys.modules[swap.original_class(module).__module__], "apply_rotary_pos_emb", None)
        if not rotates_halves(rotate):
            return "its rotary function is not the one that is known"
        return _dropout_reason(module, ("Wqkv", "Wo"), "out_drop") or {}

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        *,
        bmf_finish: Finish | None = None,
        **kwargs: Any,
    ) -> Any:
        reason = _dropout_reason(self, ("Wqkv", "Wo"), "out_drop")
        if not interface.enabled(self) or not swap.note(self, reason):
            y, weights = super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)  # type: ignore[misc]
            return y if bmf_finish is None else bmf_finish.after(y), weights
        qkv = ops.linear(hidden_states, self.Wqkv.weight, self.Wqkv.bias)
        qkv = qkv.view(*hidden_states.shape[:2], -1, self.head_dim)
        q, k, v = split_heads(qkv, [qkv.shape[2] // 3] * 3)
        q, k = ops.rotary(q, k, *position_embeddings)
        options = {
            "dropout": self.attention_dropout if self.training else 0.0,
            "scaling": self.head_dim**-0.5,
            "sliding_window": self.sliding_window,
        }
        y, weights = interface.attention_forward(self, q, k, v, attention_mask, **options, **kwargs)
        return finished_linear(self.Wo, y.flatten(2), bmf_finish, swap.active_dropout(self.out_drop)), weights


class FastMLP(Fast):
    """Gate and up are halves of one weight; activation, product and residual in one operator."""

    area = "mlp"
    finishes = True

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not interface.is_class(module, ("ModernBertMLP",)):
            return None
        activation = probe.activation(getattr(module, "act", None))
        if activation is None:
            return "an activation that is not known"
        both, last, x = probe.linear(6, 20), probe.linear(10, 6), probe.draw(1, 4, 6)
        gate, up = both(x).chunk(2, dim=-1)
        small = probe.small_copy(module, {}, {"Wi": both, "Wo": last, "drop": nn.Identity()})
        if not probe.same(probe.run(small, x), last(activate(gate, activation) * up)):
            return "a forward of its own"
        if any(layer._parameters.get("bias") is not None for layer in module.children()):
            return "a gated MLP with biases"
        return _dropout_reason(module, ("Wi", "Wo"), "drop") or {"activation": activation}

    def forward(self: Any, hidden_states: Tensor, bmf_finish: Finish | None = None) -> Tensor:
        if not swap.note(self, _dropout_reason(self, ("Wi", "Wo"), "drop") or swap.activation_watched(self.act)):
            y = super().forward(hidden_states)  # type: ignore[misc]
            return y if bmf_finish is None else bmf_finish.after(y)
        activation, p = plan(self)["activation"], swap.active_dropout(self.drop)
        if p:
            gate, up = ops.linear(hidden_states, self.Wi.weight).chunk(2, dim=-1)
            return finished_linear(self.Wo, ops.dropout(activate(gate, activation) * up, p), bmf_finish)
        weights = (*self.Wi.weight.chunk(2), self.Wo.weight)
        return within(
            bmf_finish, 0.0, lambda **how: ops.gated_mlp(hidden_states, *weights, activation=activation, **how)
        )


class FastLayer(Fast):
    """Residuals within the last product of attention and MLP."""

    area = "mlp"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        return {} if interface.is_class(module, ("ModernBertEncoderLayer",)) else None

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        normed = self.attn_norm(hidden_states)
        y, _ = finished(self.attn, Finish(hidden_states), normed, attention_mask=attention_mask, **kwargs)
        return finished(self.mlp, Finish(y), self.mlp_norm(y))


class FastModel(FastStack):
    """Packs a batch, where the head is known to ignore padding (or unpad=True was asked for), and pads at the end."""

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        return {} if interface.is_class(module, ("ModernBertModel",)) else None

    def _layers(self: Any) -> tuple[str, nn.Module | None]:
        return "layers", self.layers


RECIPES = (FastAttention, FastMLP, FastLayer, FastModel)

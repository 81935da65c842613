"""T5 (Raffel et al. 2020): scores without a scale, with a learned bias by distance that all layers share."""

from typing import Any

from torch import Tensor, nn

from . import interface, packing, swap
from .layers import Finish
from .projected import is_empty, keep
from .projections import finished, finished_linear, linears, project
from .swap import Fast
from .unpad import FastStack

_PROJECTIONS = ("q", "k", "v", "o")
_ATTENTIONS = {"T5LayerSelfAttention": "SelfAttention", "T5LayerCrossAttention": "EncDecAttention"}


class FastAttention(Fast):
    """Queries, keys and values by one product, attention with the position bias, and its gradient, then a product."""

    area = "attention"
    finishes = True

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not interface.is_class(module, ("T5Attention",)) or not hasattr(module, "scaling"):
            return None  # older versions of transformers write its attention out
        return linears(module, _PROJECTIONS) or {}

    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        cache: Any = None,
        *,
        bmf_finish: Finish | None = None,
        **kwargs: Any,
    ) -> Any:
        crosses = key_value_states is not None
        usual = interface.enabled(self) and kwargs.get("past_key_values") is None
        usual = usual and (cache is None or is_empty(cache, self.layer_idx, crosses))
        if not usual or not swap.note(self, linears(self, _PROJECTIONS)):
            y, *others = super().forward(  # type: ignore[misc]
                hidden_states, mask, key_value_states, position_bias, cache, **kwargs
            )
            return (y if bmf_finish is None else bmf_finish.after(y), *others)
        layers, head_dim = [self.q, self.k, self.v], self.key_value_proj_dim
        if key_value_states is not None:
            (q,) = project(hidden_states, layers[:1], head_dim)
            k, v = project(key_value_states, layers[1:], head_dim)
        else:
            q, k, v = project(hidden_states, layers, head_dim)
        if cache is not None:
            keep(cache, k, v, self.layer_idx, crosses)
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self.compute_bias(q.shape[2], k.shape[2], device=q.device)
        options = {"dropout": self.dropout if self.training else 0.0, "scaling": self.scaling, **kwargs}
        y, weights = interface.attention_forward(self, q, k, v, mask, position_bias=position_bias, **options)
        return finished_linear(self.o, y.flatten(2), bmf_finish), position_bias, weights


def _dropout_reason(module: Any) -> str | None:
    return swap.first_not_plain(module, (("dropout", module.dropout, nn.Dropout.forward),))


class FastAttentionLayer(Fast):
    """Dropout and residual within the last product of attention."""

    area = "attention"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        return (_dropout_reason(module) or {}) if interface.is_class(module, tuple(_ATTENTIONS)) else None

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        attention: Any = self._modules[_ATTENTIONS[swap.original_class(self).__name__]]
        mask = kwargs.get("attention_mask")
        if kwargs.get("position_bias") is None and packing.boundaries(mask) is not None:  # by position in a sequence
            _, length = packing.padded_shape(mask)  # type: ignore[arg-type]
            kwargs["position_bias"] = attention.compute_bias(length, length, device=hidden_states.device)
        if args or not swap.note(self, _dropout_reason(self)):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        finish = Finish(hidden_states, swap.active_dropout(self.dropout))
        kwargs.pop("attention_mask", None)
        return finished(attention, finish, self.layer_norm(hidden_states), mask=mask, **kwargs)


class FastMLPLayer(Fast):
    """Dropout and residual within the last product of the MLP."""

    area = "mlp"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        return (_dropout_reason(module) or {}) if interface.is_class(module, ("T5LayerFF",)) else None

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        if not swap.note(self, _dropout_reason(self)):
            return super().forward(hidden_states)  # type: ignore[misc]
        finish = Finish(hidden_states, swap.active_dropout(self.dropout))
        return finished(self.DenseReluDense, finish, self.layer_norm(hidden_states))


class FastEncoder(FastStack):
    """Packs a batch, where padding is known not to be read (or unpad=True was asked for); attention alone is padded."""

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        encodes = interface.is_class(module, ("T5Stack",)) and not module.is_decoder
        return {} if encodes else None

    def _pack(self: Any, present: Tensor, input_ids: Any, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        return {"input_ids": input_ids[present][None]}

    def _layers(self: Any) -> tuple[str, nn.Module | None]:
        first = self.block[0].layer[0]  # which makes the bias that all share
        return "block", self.block if isinstance(first, FastAttentionLayer) else None


RECIPES = (FastAttention, FastAttentionLayer, FastMLPLayer, FastEncoder)

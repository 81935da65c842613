"""DistilBERT: BERT's layers under other names, with the output layer within attention."""

from typing import Any

from torch import Tensor, nn

from . import interface, packing, post_norm, swap
from .layers import FastMLP, Finish
from .projections import attend, finished, finished_linear, linears
from .swap import Fast, plan
from .unpad import FIRST, FastEncoder

_PROJECTIONS = ("q_lin", "k_lin", "v_lin")


def _is(module: nn.Module, name: str) -> bool:
    here = swap.original_class(module).__module__.endswith(".modeling_distilbert")
    return here and interface.is_class(module, (name,))


class FastAttention(Fast):
    """Queries, keys and values by one product, attention, then a product with the residual."""

    area = "attention"
    finishes = True

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not _is(module, "DistilBertSelfAttention"):
            return None
        return linears(module, (*_PROJECTIONS, "out_lin")) or {}

    def forward(
        self: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        bmf_finish: Finish | None = None,
        **kwargs: Any,
    ) -> Any:
        first = kwargs.pop(FIRST, False)
        if not interface.enabled(self) or not swap.note(self, linears(self, (*_PROJECTIONS, "out_lin"))):
            y, weights = super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
            y = packing.first_tokens(y, attention_mask) if first else y
            return y if bmf_finish is None else bmf_finish.after(y), weights
        p, head_dim = self.dropout.p if self.training else 0.0, self.attention_head_size
        options = {"first": first, "dropout": p, **kwargs}
        y, weights = attend(self, _PROJECTIONS, head_dim, hidden_states, attention_mask, **options)
        return finished_linear(self.out_lin, y, bmf_finish), weights


class FastBlock(Fast):
    """Residuals within the last product of attention and MLP; or the whole layer in one."""

    area = "mlp"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        return {} if _is(module, "TransformerBlock") else None

    def forward(self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        y = None if (parts := self._parts()) is None else post_norm.run(parts, hidden_states, attention_mask, kwargs)
        if y is not None:
            return y
        asking = packing.first_tokens(hidden_states, attention_mask) if kwargs.get(FIRST) else hidden_states
        y, _ = finished(self.attention, Finish(asking), hidden_states, attention_mask=attention_mask, **kwargs)
        y = self.sa_layer_norm(y)
        return self.output_layer_norm(finished(self.ffn, Finish(y), y))

    def _parts(self: Any) -> post_norm.Parts | None:
        attention, mlp = self.attention, self.ffn
        fast = all(isinstance(m, kind) for m, kind in ((attention, FastAttention), (mlp, FastMLP)))
        if not fast or mlp.chunk_size_feed_forward:
            return None
        return post_norm.Parts(
            attention=attention,
            head_dim=attention.attention_head_size,
            dense=(*(attention._modules[name] for name in _PROJECTIONS), attention.out_lin, mlp.lin1, mlp.lin2),
            norms=(self.sa_layer_norm, self.output_layer_norm),
            dropouts=(attention.dropout, None, mlp.dropout),
            callers=(attention, mlp, mlp.activation),
            activation=plan(mlp)["activation"],
        )


class FastTransformer(FastEncoder):
    """Runs packed batches, and pads at the end."""

    _output = "BaseModelOutput"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        return {} if _is(module, "Transformer") else None

    def _takes_first(self, layer: Any) -> bool:
        return swap.is_fast(layer) and isinstance(layer.attention, FastAttention)


RECIPES = (FastAttention, FastBlock, FastTransformer)

"""Recipes for models of transformers: BERT's and Llama's attention, BERT's layers, the loss of language models."""

import inspect
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops._activation import activate
from ..ops.rotary import reference as rotary_reference
from . import interface, post_norm, probe, swap
from .layers import dense_mlp
from .projections import attend, cached, linears, project
from .swap import Fast, plan
from .unpad import ATTENTION_BLOCKS, FIRST, LAYERS, asked_by, labels_ignore_padding

# Classes whose forward is the one these recipes compute; transformers writes them as copies of the first.
BERT_ATTENTIONS = (
    "BertSelfAttention",
    "RobertaSelfAttention",
    "XLMRobertaSelfAttention",
    "CamembertSelfAttention",
    "ElectraSelfAttention",
)
LLAMA_ATTENTIONS = (
    "LlamaAttention",
    "MistralAttention",
    "Qwen2Attention",
    "Qwen3Attention",
    "GemmaAttention",
    "Gemma2Attention",
)
_LLAMA_DENSE = ("q_proj", "k_proj", "v_proj", "o_proj")
CAUSAL_MODELS = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "GPT2LMHeadModel",
)
MASKED_MODELS = (
    "BertForMaskedLM",
    "RobertaForMaskedLM",
    "XLMRobertaForMaskedLM",
    "CamembertForMaskedLM",
    "DistilBertForMaskedLM",
    "ElectraForMaskedLM",
    "ModernBertForMaskedLM",
)
COUNTING = ("ModernBertForMaskedLM",)  # masked models whose loss is divided by num_items_in_batch too


class FastBertAttention(Fast):
    """Queries, keys and values by one product, then attention."""

    area = "attention"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not interface.is_class(module, BERT_ATTENTIONS):
            return None
        return linears(module, ("query", "key", "value")) or {}

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not interface.enabled(self) or cached(kwargs) or any(a is not None for a in args):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        if not swap.note(self, linears(self, ("query", "key", "value"))):
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        p, first = self.dropout.p if self.training else 0.0, kwargs.pop(FIRST, False)
        names, head_dim = ("query", "key", "value"), self.attention_head_size
        return attend(self, names, head_dim, hidden_states, attention_mask, first=first, dropout=p, **kwargs)


class FastLlamaAttention(Fast):
    """Queries, keys and values by one product, rotary positions, then attention."""

    area = "rotary"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not interface.is_class(module, LLAMA_ATTENTIONS):
            return None
        rotate = getattr(sys.modules[swap.original_class(module).__module__], "apply_rotary_pos_emb", None)
        if not rotates_halves(rotate):
            return "its rotary function is not the one that is known"
        if reason := linears(module, _LLAMA_DENSE):
            return reason
        return {"caches": "cache" in inspect.signature(swap.original_class(module).forward).parameters}

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        reason = linears(self, _LLAMA_DENSE)
        if position_embeddings is None or position_embeddings[0].shape[-1] != self.head_dim:
            reason = "positions for a part of each head"
        usual = interface.enabled(self) and not any(a is not None for a in args)
        if cached(kwargs):
            usual = usual and plan(self)["caches"] and kwargs.get("past_key_values") is None
        if not usual or not swap.note(self, reason):
            return super().forward(hidden_states, position_embeddings, attention_mask, *args, **kwargs)  # type: ignore[misc]
        q, k, v = project(hidden_states, [self.q_proj, self.k_proj, self.v_proj], self.head_dim)
        if "q_norm" in self._modules:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = ops.rotary(q, k, *position_embeddings)
        cache = kwargs.pop("cache", None)
        if cache is not None:
            k = k.to(torch.promote_types(k.dtype, position_embeddings[0].dtype))  # as autocast makes it of the model's
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
        softcap = getattr(self, "attn_logit_softcapping", None)
        y, weights = interface.attention_forward(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            softcap=softcap,
            **kwargs,
        )
        return ops.linear(y.flatten(2), self.o_proj.weight, self.o_proj.bias), weights


def rotates_halves(rotate: Callable | None) -> bool:
    """Whether a function of (query, key, cos, sin) does what ops.rotary does."""
    if rotate is None:
        return False
    q, k, cos, sin = probe.draw(1, 2, 3, 4), probe.draw(1, 1, 3, 4), probe.draw(1, 3, 4), probe.draw(1, 4, 3).mT
    try:
        found = rotate(q, k, cos, sin)
    except Exception:
        return False
    return all(torch.allclose(a, b) for a, b in zip(found, rotary_reference(q, k, cos, sin), strict=True))


_OUTPUT = ("dense", "LayerNorm", "dropout")


def _output_reason(module: Any) -> str | None:
    """Why a module's dense layer and dropout cannot be one product with the residual."""
    children = (("dense", nn.Linear.forward), ("dropout", nn.Dropout.forward))
    return swap.first_not_plain(module, tuple((name, module._modules[name], forward) for name, forward in children))


def _small_output(module: Any, into: int, out: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """A small copy of such a module, and what it should compute."""
    torch_state = {"dense": probe.linear(into, out), "LayerNorm": probe.layer_norm(out), "dropout": nn.Identity()}
    small = probe.small_copy(module, {}, torch_state)
    return small, lambda h, residual: torch_state["LayerNorm"](torch_state["dense"](h) + residual)


class FastBertOutput(Fast):
    """Dense layer, dropout and residual in one product, then the norm."""

    area = "mlp"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if set(module._modules) != set(_OUTPUT):
            return None
        small, expected = _small_output(module, 6, 6)
        h, residual = probe.draw(1, 4, 6), probe.draw(1, 3, 6)[:, [0, 1, 2, 0]]
        if not probe.same(probe.run(small, h, residual), expected(h, residual)):
            return None
        return _output_reason(module) or {}

    def forward(self: Any, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        if not swap.note(self, _output_reason(self)):
            return super().forward(hidden_states, input_tensor)  # type: ignore[misc]
        p, dense = swap.active_dropout(self.dropout), self.dense
        summed = ops.linear(hidden_states, dense.weight, dense.bias, dropout_p=p, residual=input_tensor)
        return self.LayerNorm(summed)


def _rebuilt(intermediate: nn.Module, output: nn.Module) -> bool:
    """Whether these two have other children than FastBertMLP knows."""
    return output._modules.keys() != set(_OUTPUT) or "dense" not in intermediate._modules


def _bert_mlp_reason(module: Any) -> str | None:
    if _rebuilt(*swap.children(module, "intermediate", "output")):
        return "intermediate or output was replaced"
    if reason := swap.first_not_plain(module, (("dense", module.intermediate.dense, nn.Linear.forward),)):
        return f"intermediate.{reason}"
    for name in ("intermediate", "output"):
        if reason := swap.watched(module._modules[name]):
            return f"{name} {reason}"
    return swap.activation_watched(module.intermediate.intermediate_act_fn) or _output_reason(module.output)


class FastBertMLP(Fast):
    """Both dense layers, activation, dropout and residual in one operator, then the norm."""

    area = "mlp"
    methods: ClassVar[tuple[str, ...]] = ("feed_forward_chunk",)

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        intermediate, output = (module._modules.get(name) for name in ("intermediate", "output"))
        if intermediate is None or output is None or not hasattr(module, "feed_forward_chunk"):
            return None
        if _rebuilt(intermediate, output):
            return None
        activation = probe.activation(getattr(intermediate, "intermediate_act_fn", None))
        if activation is None:
            return "an activation that is not known"
        dense = probe.linear(6, 10)
        small_output, expected = _small_output(output, 10, 6)
        children = {"intermediate": probe.small_copy(intermediate, {}, {"dense": dense}), "output": small_output}
        x = probe.draw(1, 4, 6)
        y = probe.run(probe.small_copy(module, {}, children), x, method="feed_forward_chunk")
        if not probe.same(y, expected(activate(dense(x), activation), x)):
            return "a feed_forward_chunk of its own"
        return _bert_mlp_reason(module) or {"activation": activation}

    def feed_forward_chunk(self: Any, attention_output: Tensor) -> Tensor:
        if not swap.note(self, _bert_mlp_reason(self)):
            return super().feed_forward_chunk(attention_output)  # type: ignore[misc]
        layers, p = [self.intermediate.dense, self.output.dense], swap.active_dropout(self.output.dropout)
        summed = dense_mlp(attention_output, layers, plan(self)["activation"], 0.0, p, residual=attention_output)
        return self.output.LayerNorm(summed)


class FastBertLayer(FastBertMLP):
    """The whole layer in one, or both dense layers, activation, dropout and residual, then the norm."""

    methods = ("forward", *FastBertMLP.methods)

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        return super().match(module) if interface.is_class(module, LAYERS) else None

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        y = None
        if self.chunk_size_feed_forward == 0 and not any(a is not None for a in args):
            parts = self._parts()
            y = None if parts is None else post_norm.run(parts, hidden_states, attention_mask, kwargs)
        return super().forward(hidden_states, attention_mask, *args, **kwargs) if y is None else y  # type: ignore[misc]

    def _parts(self: Any) -> post_norm.Parts | None:
        attention, intermediate, output = swap.children(self, "attention", "intermediate", "output")
        if not interface.is_class(attention, ATTENTION_BLOCKS) or _rebuilt(intermediate, output):
            return None
        inner, added = swap.children(attention, "self", "output")
        if not all(isinstance(m, kind) for m, kind in ((inner, FastBertAttention), (added, FastBertOutput))):
            return None
        query, key, value, dropout = swap.children(inner, "query", "key", "value", "dropout")
        out, norm1, dropout1 = swap.children(added, *_OUTPUT)
        down, norm2, dropout2 = swap.children(output, *_OUTPUT)
        return post_norm.Parts(
            attention=inner,
            head_dim=inner.attention_head_size,
            dense=(query, key, value, out, *swap.children(intermediate, "dense"), down),
            norms=(norm1, norm2),
            dropouts=(dropout, dropout1, dropout2),
            callers=(attention, inner, added, intermediate, output, intermediate.intermediate_act_fn),
            activation=plan(self)["activation"],
        )


class FastLanguageModel(Fast):
    """While training, output layer and loss in one operator; `logits` of its output is then None."""

    area = "loss"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        causal = interface.is_class(module, CAUSAL_MODELS)
        if not causal and not interface.is_class(module, MASKED_MODELS):
            return None
        return _head_reason(module) or {"causal": causal, "counts": causal or interface.is_class(module, COUNTING)}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        how = plan(self)
        labels = kwargs.get("labels")
        keeps = kwargs.get("logits_to_keep", 0)
        wanted = self.training and not torch.compiler.is_compiling()
        whole = (
            isinstance(keeps, int) and keeps == 0 and kwargs.get("return_dict", self.config.return_dict) is not False
        )
        if (
            labels is None
            or not wanted
            or not whole
            or not swap.note(self, _head_reason(self) or _loss_reason(self, how))
        ):
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        loss_options = {name: kwargs.pop(name, None) for name in ("num_items_in_batch", "shift_labels", "ignore_index")}
        unpadded = not how["causal"] and not args[1:] and labels_ignore_padding(labels, kwargs.get("attention_mask"))
        asked = asked_by(self, "tokens") if unpadded else {}
        head, inputs = self.get_output_embeddings(), []

        def keep_input(_: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
            inputs.append(given[0])
            return given[0][..., :0, :]  # no token, no logits

        hook = head.register_forward_pre_hook(keep_input)
        try:
            outputs = super().forward(*args, **{**kwargs, **asked, "labels": None})  # type: ignore[misc]
        finally:
            hook.remove()
        loss = _loss(self, head, inputs[0], labels, how, **loss_options)
        others = {name: value for name, value in outputs.items() if name not in ("loss", "logits")}
        return type(outputs)(loss=loss, **others)


def _head_reason(module: Any) -> str | None:
    head = module.get_output_embeddings()
    return swap.first_not_plain(module, (("the output layer", head, nn.Linear.forward),))


def _loss_reason(module: Any, how: dict[str, Any]) -> str | None:
    if getattr(module, "sparse_prediction", False):
        return "sparse_prediction, by which the model itself computes no other logits"
    if how["counts"]:
        from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

        usual = module.loss_function is (ForCausalLMLoss if how["causal"] else ForMaskedLMLoss)
        return None if usual else "a loss function of its own"
    own = getattr(module, "mlm_loss_fct", None)  # DistilBERT's
    usual = own is None or (type(own) is nn.CrossEntropyLoss and own.weight is None and own.label_smoothing == 0)
    return None if usual else "a loss function of its own"


def _loss(
    module: Any,
    head: Any,
    hidden: Tensor,
    labels: Tensor,
    how: dict[str, Any],
    num_items_in_batch: Any,
    shift_labels: Tensor | None,
    ignore_index: int | None,
) -> Tensor:
    """transformers' loss: of the next token (divided by num_items_in_batch, if given) or of the masked ones."""
    causal, counts = how["causal"], how["counts"]
    ignored = -100 if ignore_index is None or not counts else ignore_index
    target = labels
    if causal:
        target = F.pad(labels, (0, 1), value=ignored)[..., 1:] if shift_labels is None else shift_labels
    fixed_bias = getattr(module, "final_logits_bias", None)  # BART's
    counted = counts and num_items_in_batch is not None
    loss = ops.linear_cross_entropy(
        hidden,
        head.weight,
        target.to(hidden.device, torch.int64).reshape(hidden.shape[:-1]),
        bias=head.bias if fixed_bias is None else fixed_bias[0],
        ignore_index=ignored,
        softcap=getattr(module.config, "final_logit_softcapping", None) if causal else None,
        reduction="sum" if counted else "mean",
    )
    if not counted:
        return loss
    return loss / (num_items_in_batch.to(loss.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch)

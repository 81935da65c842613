"""Encoder-decoder models: layers whose MLP is written out in their forward (BART's, Whisper's), padding, the loss.

Cross attention is given the encoder's mask, so no model reads what its encoder makes of padding.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from . import interface, packing, probe, swap
from .hugging_face import FastLanguageModel
from .layers import FastEmbedding, Finish, dense_mlp
from .projections import finished, linears
from .swap import Fast, plan
from .unpad import READS, FastStack

_DENSE = ("fc1", "fc2")
_ATTENTIONS = ("self_attn", "encoder_attn")
_CHILDREN = {"self_attn", "self_attn_layer_norm", *_DENSE, "final_layer_norm"}
_CROSS = {"encoder_attn", "encoder_attn_layer_norm"}
_DROPOUTS = ("dropout", "activation_dropout")
_READ = ("input_ids", "attention_mask")
_UNUSUAL = ("encoder_outputs", "inputs_embeds", "output_attentions", "output_hidden_states")
_MEMORY = ("encoder_hidden_states", "encoder_attention_mask", "cache", "use_cache")
# Whose encoder's forward is BART's: embeddings, layers that take the mask, and at most a norm.
PREFIXES = ("Bart", "MBart", "Marian", "Pegasus", "PLBart", "Blenderbot", "BlenderbotSmall", "M2M100")
MODELS = ("BartForConditionalGeneration", "T5ForConditionalGeneration", "WhisperForConditionalGeneration")


class FastLayer(Fast):
    """Both dense layers, activation, dropout and residual in one operator; dropout and residual after attention too."""

    area = "mlp"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        names = set(module._modules) - {"activation_fn"}
        if names not in (_CHILDREN, _CHILDREN | _CROSS) or not all(name in module.__dict__ for name in _DROPOUTS):
            return None
        parameters = list(inspect.signature(swap.original_class(module).forward).parameters)
        decodes = names > _CROSS
        if parameters[:2] != ["self", "hidden_states"] or (decodes and not set(_MEMORY) <= set(parameters)):
            return None
        activation = probe.activation(getattr(module, "activation_fn", None))
        if activation is None:
            return "an activation that is not known"
        how = {"activation": activation, "decodes": decodes, "named": parameters[2:]}
        if reason := _reason(module):
            return reason
        found = (first for first in (True, False) if _computes_this(module, {**how, "norm_first": first}))
        norm_first = next(found, None)
        return "a forward of its own" if norm_first is None else {**how, "norm_first": norm_first}

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        how = plan(self)
        given = {**dict(zip(how["named"], args, strict=False)), **kwargs}
        hidden_states = packing.pack(hidden_states, given.get("attention_mask"))  # embeddings were made with padding
        reason = "float16" if hidden_states.dtype is torch.float16 else _reason(self)
        if not swap.note(self, reason):
            return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        mask = given.pop("attention_mask", None)
        p, inner = (getattr(self, name) if self.training else 0.0 for name in _DROPOUTS)

        def add(x: Tensor, norm: nn.Module, step: Any) -> Tensor:
            return step(norm(x), x) if how["norm_first"] else norm(step(x, x))

        def add_attention(name: str, x: Tensor, **options: Any) -> Tensor:
            attention = self._modules[name]
            norm = self._modules[f"{name}_layer_norm"]
            return add(x, norm, lambda y, x: finished(attention, Finish(x, p), y, **options)[0])

        if how["decodes"]:
            states, memory_mask, cache, _ = (given.pop(name, None) for name in _MEMORY)
            x = add_attention("self_attn", hidden_states, attention_mask=mask, cache=cache, **given)
            if states is not None:
                options = {"key_value_states": states, "attention_mask": memory_mask, "cache": cache, **given}
                x = add_attention("encoder_attn", x, **options)
        else:
            x = add_attention("self_attn", hidden_states, attention_mask=mask, **given)
        layers, activation = [self.fc1, self.fc2], how["activation"]
        return add(x, self.final_layer_norm, lambda y, x: dense_mlp(y, layers, activation, inner, p, residual=x))


def _reason(module: Any) -> str | None:
    return swap.activation_watched(module.activation_fn) or linears(module, _DENSE)


class _Attention(nn.Module):
    """In its place while a layer is looked at: a function of all that attention is given."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, key_value_states: Any = None, **_: Any) -> Any:
        over = hidden_states if key_value_states is None else key_value_states
        return hidden_states * 2 + over.sum(1, keepdim=True) + attention_mask, None


def _computes_this(module: nn.Module, how: dict[str, Any]) -> bool:
    """Whether the layer's own forward agrees with ours on a small copy: as it is, and with all of a dropout dropped."""
    children: dict[str, nn.Module] = {"fc1": probe.linear(6, 10), "fc2": probe.linear(10, 6)}
    for name in module._modules:
        if name in _ATTENTIONS:
            children[name] = _Attention()
        elif name.endswith("_norm"):
            children[name] = probe.layer_norm(6)
    small, fast = (probe.small_copy(module, {}, children) for _ in range(2))
    swap.apply(fast, FastLayer, how)
    args = [probe.draw(2, 4, 6), probe.draw(2, 1, 6)]
    args += [probe.draw(2, 5, 6), probe.draw(2, 1, 6)] if how["decodes"] else []
    for dropped in (None, *_DROPOUTS):
        for copy in (small, fast):
            copy.__dict__.update({name: float(name == dropped) for name in _DROPOUTS}, training=dropped is not None)
        if not probe.same(probe.run(small, *args), probe.run(fast, *args)):
            return False
    return True


class FastEncoder(FastStack):
    """Packs a batch, where padding is known not to be read (or unpad=True was asked for), and pads at the end."""

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        return {} if interface.is_class(module, tuple(f"{prefix}Encoder" for prefix in PREFIXES)) else None

    def _pack(self: Any, present: Tensor, input_ids: Any, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        return {"input_ids": input_ids}  # positions are counted within its forward: the first layer packs

    def _layers(self: Any) -> tuple[str, nn.Module | None]:
        return "layers", self.layers if all(isinstance(layer, FastLayer) for layer in self.layers) else None


class FastEncoderDecoder(Fast):
    """Its encoder makes nothing of padding, which is not read."""

    area = "unpad"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        known = interface.is_class(module, tuple(f"{prefix}Model" for prefix in (*PREFIXES, "T5")))
        return {"named": _named(module)} if known else None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **_encoded(self, args, kwargs))  # type: ignore[misc]


def _named(module: nn.Module) -> set[str]:
    return set(inspect.signature(swap.original_class(module).forward).parameters)


def _encoded(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """kwargs of a model's forward, with its encoder's output, which has nothing for padding, if one can be had."""
    encoder: Any = model._modules.get("encoder")
    unpads = isinstance(encoder, FastStack)
    given = {**dict(zip(_READ, args, strict=False)), **kwargs}
    usual = given.get("input_ids") is not None and not any(given.get(name) is not None for name in _UNUSUAL)
    if not unpads or not usual or len(args) > 2 or torch.compiler.is_compiling():
        return kwargs
    others = {n: value for n, value in given.items() if n not in plan(model)["named"] and n != "return_dict"}
    memory = encoder(**{name: given.get(name) for name in _READ}, **others, **{READS: "tokens"})
    if not isinstance(memory, tuple):  # T5's is of a class that its own model takes for a tuple
        from transformers.modeling_outputs import BaseModelOutput

        kept = ("last_hidden_state", "hidden_states", "attentions")
        memory = BaseModelOutput(**{name: memory.get(name) for name in kept})
    return {**kwargs, "encoder_outputs": memory}


class FastModel(FastLanguageModel):
    """While training, output layer and loss in one operator; `logits` of its output is then None."""

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not interface.is_class(module, MODELS):
            return None
        head: Any = module.get_output_embeddings()  # type: ignore[operator]
        reason = swap.first_not_plain(module, (("the output layer", head, nn.Linear.forward),))
        return reason or {"causal": False, "counts": False, "named": _named(module)}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """What the decoder reads is made of the labels here: the model's own forward will see none."""
        kwargs = _encoded(self, args, kwargs)
        labels = kwargs.get("labels")
        most = getattr(self, "max_target_positions", None)  # Whisper's
        if labels is None or len(args) > 2 or (most is not None and labels.shape[1] > most):
            return super(FastLanguageModel, self).forward(*args, **kwargs)  # type: ignore[misc]
        if kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
            kwargs["decoder_input_ids"] = _shifted(self, labels)
        if swap.original_class(self).__name__ == "BartForConditionalGeneration":
            kwargs["use_cache"] = False  # as its own forward has it where there are labels
        return super().forward(*args, **kwargs)


def _shifted(model: Any, labels: Tensor) -> Tensor:
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return model.prepare_decoder_input_ids_from_labels(labels)
    from transformers.models.whisper.modeling_whisper import shift_tokens_right

    return shift_tokens_right(labels, model.config.pad_token_id, model.config.decoder_start_token_id)


class FastScaledEmbedding(FastEmbedding):
    """Rows of a table times a number; their gradient is written once."""

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not isinstance(module, nn.Embedding) or "embed_scale" not in module.__dict__:
            return None
        small = probe.small_copy(module, {"weight": probe.draw((module.padding_idx or 0) + 3, 6)}, {})
        token: Any = torch.arange(3)
        if not probe.same(probe.run(small, token), small.weight[token] * module.embed_scale):  # type: ignore[index, operator]
            return "a forward of its own"
        return cls._unusual(module) or {}

    def forward(self: Any, input_ids: Tensor) -> Tensor:
        rows = self._rows(input_ids)
        if rows is None:
            return super(FastEmbedding, self).forward(input_ids)  # type: ignore[misc]
        return rows if self.embed_scale == 1.0 else rows * self.embed_scale


RECIPES = (FastModel, FastEncoderDecoder, FastEncoder, FastLayer, FastScaledEmbedding)

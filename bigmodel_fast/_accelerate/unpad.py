"""Encoders of transformers without padding: tokens are packed at the model's entry and padded at the encoder's exit.

In between a batch is one row of all its tokens, [1, tokens, width], which every layer takes as it is; attention is told
where sequences begin and end by the mask, an int64 tensor that no other attention accepts. A model whose head reads
the first token only computes no other in the last layer, from its queries on.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import interface, packing, swap
from .swap import Fast, plan

# Classes whose forward is the one these recipes know; transformers writes them as copies of the first.
PREFIXES = ("Bert", "Roberta", "XLMRoberta", "Camembert", "Electra")
OTHERS = ("DistilBert", "ModernBert")  # whose heads are the same
FIRST_TOKEN_HEADS = (
    *(f"{prefix}ForSequenceClassification" for prefix in (*PREFIXES, *OTHERS)),
    *(f"{prefix}ForMultipleChoice" for prefix in (*PREFIXES, *OTHERS) if prefix != "Electra"),
    "BertForNextSentencePrediction",
)  # ModernBERT's may take the mean of all tokens but padding
LAYERS, ATTENTION_BLOCKS = (tuple(f"{prefix}{kind}" for prefix in PREFIXES) for kind in ("Layer", "Attention"))
TOKEN_HEADS = tuple(f"{prefix}ForTokenClassification" for prefix in (*PREFIXES, *OTHERS))

READS = "bmf_reads"  # a keyword from a head to its encoder: "first" (token) or "tokens" (those that are not padding)
FIRST = "bmf_first"  # a keyword to the last layer: only the first token of each sequence is asked for


def asked_by(head: Any, reads: str) -> dict[str, str]:
    """The keyword for the forward of a model with a head that reads no more than this of its encoder's output."""
    return {READS: reads} if isinstance(head._modules.get(head.base_model_prefix), FastEncoderModel) else {}


def labels_ignore_padding(labels: Tensor | None, mask: Tensor | None) -> bool:
    """Whether no padding has a label."""
    if mask is None or labels is None:
        return labels is None
    return mask.shape == labels.shape and bool((labels[mask == 0] == -100).all())


class FastHead(Fast):
    """Its encoder computes no more than the head reads: no padding, in the last layer the first token alone."""

    area = "unpad"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        first = interface.is_class(module, FIRST_TOKEN_HEADS)
        return {"reads": "first" if first else "tokens"} if first or interface.is_class(module, TOKEN_HEADS) else None

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        reads = plan(self)["reads"]
        if torch.compiler.is_compiling():
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        known = reads == "first" or (not args[1:] and _labels_known(kwargs))
        return super().forward(*args, **kwargs, **(asked_by(self, reads) if known else {}))  # type: ignore[misc]


def _labels_known(kwargs: dict[str, Any]) -> bool:
    return labels_ignore_padding(kwargs.get("labels"), kwargs.get("attention_mask"))


class FastEncoderModel(Fast):
    """Packs a batch, where the head is known to ignore padding (or unpad=True was asked for)."""

    area = "unpad"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not interface.is_class(module, tuple(f"{prefix}Model" for prefix in (*PREFIXES, "DistilBert"))):
            return None
        return "a decoder" if getattr(module.config, "is_decoder", False) else {}

    def forward(
        self: Any, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        reads = kwargs.pop(READS, None)
        always = plan(self)["wanted"] is True
        if reads is None and always and not torch.compiler.is_compiling():
            reads = "tokens"
        if reads is None or not swap.note(self, self._unusual(input_ids, args, kwargs)):
            return super().forward(input_ids, attention_mask, *args, **kwargs)  # type: ignore[misc]
        present = _padded(input_ids, attention_mask, always)
        if present is None:
            return self._run(reads, None, input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        packed, mask = self._pack(present, input_ids, kwargs), packing.make_mask(present)
        return self._run(reads, mask, **{**kwargs, **packed, "attention_mask": mask})

    def _pack(self: Any, present: Tensor, input_ids: Any, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """The arguments that say something of each token, of those that are no padding."""
        positions = kwargs.get("position_ids")
        given = {
            "input_ids": input_ids,
            "position_ids": _positions_of(self.embeddings, input_ids) if positions is None else positions,
            "token_type_ids": kwargs.get("token_type_ids"),
        }
        return {name: t.expand_as(present)[present][None] for name, t in given.items() if t is not None}

    def _run(self: Any, reads: str, mask: Tensor | None, **kwargs: Any) -> Any:
        """The model's own forward, whose encoder pads. mask: that of a packed batch."""
        return super().forward(**kwargs, **{READS: reads})  # type: ignore[misc]

    def _unusual(self: Any, input_ids: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        if input_ids is None or input_ids.dim() != 2 or any(a is not None for a in args):
            return "called without input_ids, or with an encoder's output"
        others = ("inputs_embeds", "encoder_hidden_states", "encoder_attention_mask", "cache", "past_key_values")
        if any(kwargs.get(name) is not None for name in others) or getattr(self.config, "is_decoder", False):
            return "a decoder, or embeddings of its own"
        name, layers = self._layers()
        if not interface.enabled(self) or layers is None:
            return "its encoder or attention is not accelerated"
        for kind in ("hidden_states", "attentions"):
            if kwargs.get(f"output_{kind}", getattr(self.config, f"output_{kind}", False)):
                return f"output_{kind}=True asks for what padding makes"
        if not any(interface.has_hooks(m) for m in _modules(layers)):
            return None
        watched = next(inner for inner, m in layers.named_modules() if interface.has_hooks(m))
        return f"{name}.{watched} has hooks"

    def _layers(self: Any) -> tuple[str, nn.Module | None]:
        """The module that holds the layers, if it takes packed batches, and its name."""
        name = "transformer" if "transformer" in self._modules else "encoder"
        module: nn.Module = self._modules[name]
        return name, module if isinstance(module, FastEncoder) else None


class FastStack(FastEncoderModel):
    """Packs a batch, where padding is known not to be read (or unpad=True was asked for), and pads at the end."""

    def _run(self: Any, reads: str, mask: Tensor | None, **kwargs: Any) -> Any:
        outputs = super(FastEncoderModel, self).forward(**kwargs)  # type: ignore[misc]
        if mask is None:
            return outputs
        if isinstance(outputs, tuple):
            return packing.pad(packing.pack(outputs[0], mask), mask), *outputs[1:]
        outputs["last_hidden_state"] = packing.pad(packing.pack(outputs["last_hidden_state"], mask), mask)
        return outputs


def _modules(module: nn.Module) -> list[nn.Module]:
    """A module and all below it; at each call of a model, so without names, which take most of modules()' time."""
    found = [module]
    for m in found:
        found += [child for child in m._modules.values() if child is not None]
    return found


def _padded(input_ids: Any, attention_mask: Tensor | None, wait: bool) -> Tensor | None:
    """Which tokens [B, S] are no padding, if there is padding, all of it on the right of at least one token.

    On a GPU only if one may `wait` for the answer.
    """
    if not isinstance(attention_mask, Tensor) or attention_mask.shape != input_ids.shape:
        return None
    if not (attention_mask.is_cpu or wait):
        return None
    present = attention_mask != 0
    lengths = present.sum(1, keepdim=True)
    on_the_right = torch.equal(present, torch.arange(present.shape[1], device=present.device) < lengths)
    return present if on_the_right and present[:, 0].all() and not present.all() else None


def _positions_of(embeddings: Any, input_ids: Any) -> Tensor:
    """The positions [1 or B, S] that a model gives to tokens by default."""
    make = getattr(embeddings, "create_position_ids_from_input_ids", None)  # RoBERTa's kind counts from its padding_idx
    if make is None:
        return torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    return make(input_ids, embeddings.padding_idx)


class FastEncoder(Fast):
    """Runs packed batches, and pads at the end."""

    area = "unpad"
    _output = "BaseModelOutputWithPastAndCrossAttentions"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        return {} if interface.is_class(module, tuple(f"{prefix}Encoder" for prefix in PREFIXES)) else None

    def forward(self: Any, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        reads = kwargs.pop(READS, None)
        if reads is None:
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        from transformers import modeling_outputs

        kwargs = {name: value for name, value in kwargs.items() if value is not None and name != "use_cache"}
        *layers, last = self.layer
        first = reads == "first" and self._takes_first(last)
        for layer in layers:
            hidden_states = layer(hidden_states, attention_mask, **kwargs)
        hidden_states = last(hidden_states, attention_mask, **kwargs, **({FIRST: True} if first else {}))
        if packing.boundaries(attention_mask) is not None:
            hidden_states = hidden_states.transpose(0, 1) if first else packing.pad(hidden_states, attention_mask)
        return getattr(modeling_outputs, self._output)(last_hidden_state=hidden_states)

    def _takes_first(self, layer: Any) -> bool:
        """Whether a layer can do with the queries of the first tokens."""
        return isinstance(layer.attention, FastAttentionBlock)


class FastAttentionBlock(Fast):
    """Attention and its output; in the last layer of some models for the first tokens alone."""

    area = "unpad"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not interface.is_class(module, ATTENTION_BLOCKS):
            return None
        return "cross attention" if module.is_cross_attention else {}

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        if not kwargs.pop(FIRST, False):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        y, weights = self.self(hidden_states, attention_mask=attention_mask, **kwargs, **{FIRST: True})
        if y.shape[1] == hidden_states.shape[1]:
            y = packing.first_tokens(y, attention_mask)
        return self.output(y, packing.first_tokens(hidden_states, attention_mask)), weights

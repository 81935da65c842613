"""Recipes for Whisper: its layers, whose MLP is written out in their forward, and its loss."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from . import interface, probe, swap
from .hugging_face import FastLanguageModel, linears
from .layers import dense_mlp
from .swap import Fast, plan


class FastWhisperLayer(Fast):
    """Both dense layers, activation, dropout and residual in one operator; dropout and residual after attention too."""

    area = "mlp"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not interface.is_class(module, ("WhisperEncoderLayer", "WhisperDecoderLayer")):
            return None
        activation = probe.activation(getattr(module, "activation_fn", None))
        if activation is None:
            return "an activation that is not known"
        how = {"activation": activation, "decodes": "encoder_attn" in module._modules}
        return _reason(module) or (how if _computes_this(module, how) else "a forward of its own")

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        reason = "float16" if hidden_states.dtype is torch.float16 else _reason(self)
        if not swap.note(self, reason):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        p = self.dropout if self.training else 0.0

        def add_attention(name: str, x: Tensor, **options: Any) -> Tensor:
            y, _ = self._modules[name](self._modules[f"{name}_layer_norm"](x), **options)
            return ops.dropout(y, p, residual=x)

        names = ("encoder_hidden_states", "encoder_attention_mask", "cache", "use_cache")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if plan(self)["decodes"]:
            states, mask, cache, _ = (given.pop(name, None) for name in names)
            x = add_attention("self_attn", hidden_states, attention_mask=attention_mask, cache=cache, **given)
            if states is not None:
                options = {"key_value_states": states, "attention_mask": mask, "cache": cache, **given}
                x = add_attention("encoder_attn", x, **options)
        else:
            x = add_attention("self_attn", hidden_states, attention_mask=attention_mask, **given)
        inner = self.activation_dropout if self.training else 0.0
        normed, layers = self.final_layer_norm(x), [self.fc1, self.fc2]
        return dense_mlp(normed, layers, plan(self)["activation"], inner, p, residual=x)


def _reason(module: Any) -> str | None:
    if isinstance(module.activation_fn, nn.Module) and swap.hooked(module.activation_fn):
        return "the activation has hooks"
    return linears(module, ("fc1", "fc2"))


class _Attention(nn.Module):
    """In its place while a layer is looked at: a function of all that attention is given."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, key_value_states: Any = None, **_: Any) -> Any:
        over = hidden_states if key_value_states is None else key_value_states
        return hidden_states * 2 + over.sum(1, keepdim=True) + attention_mask, None


def _computes_this(module: nn.Module, how: dict[str, Any]) -> bool:
    """Whether the layer's own forward agrees with ours, on a small copy."""
    children: dict[str, nn.Module] = {"fc1": probe.linear(6, 10), "fc2": probe.linear(10, 6)}
    for name in module._modules:
        if name.endswith("_attn"):
            children[name] = _Attention()
        elif name.endswith("_norm"):
            children[name] = probe.layer_norm(6)
    small, fast = (probe.small_copy(module, {}, children) for _ in range(2))
    swap.apply(fast, FastWhisperLayer, how)
    args = [probe.draw(2, 4, 6), probe.draw(2, 1, 6)]
    args += [probe.draw(2, 5, 6), probe.draw(2, 1, 6)] if how["decodes"] else []
    return probe.same(probe.run(small, *args), probe.run(fast, *args))


class FastWhisperModel(FastLanguageModel):
    """While training, output layer and loss in one operator; `logits` of its output is then None."""

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not interface.is_class(module, ("WhisperForConditionalGeneration",)):
            return None
        return linears(module, ("proj_out",)) or {"causal": False}

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """What the decoder reads is made of the labels here: the model's own forward will see none."""
        from transformers.models.whisper.modeling_whisper import shift_tokens_right

        labels = kwargs.get("labels")
        if labels is None or labels.shape[1] > self.max_target_positions or len(args) > 2:
            return super(FastLanguageModel, self).forward(*args, **kwargs)  # type: ignore[misc]
        if kwargs.get("decoder_input_ids") is None and kwargs.get("decoder_inputs_embeds") is None:
            start = (self.config.pad_token_id, self.config.decoder_start_token_id)
            kwargs["decoder_input_ids"] = shift_tokens_right(labels, *start)
        return super().forward(*args, **kwargs)

"""Recipes for torch's multi-head attention and its Transformer layers."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops._heads import split_heads
from . import probe, swap
from .layers import dense_mlp
from .swap import Fast, plan


def key_lengths(present: Tensor) -> Tensor | None:
    """How many keys there are, if `present` [B, S] is true for the first keys of each row and no others (CPU only)."""
    if not present.is_cpu or torch.compiler.is_compiling():
        return None  # elsewhere one would wait for the answer
    lengths = present.sum(1)
    first = torch.arange(present.shape[1]) < lengths[:, None]
    return lengths if torch.equal(present, first) else None


_Masks = tuple[Tensor | None, Tensor | None, bool]  # attn_mask, key_padding_mask, is_causal


class Refused(Exception):
    """The call is one for the original forward; says why."""


def _mask_options(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, heads: int, query: Tensor, key: Tensor
) -> dict[str, Any]:
    """torch's masks (True: may not be seen) as ops.attention takes them. query, key: [B, S, E]."""
    options: dict[str, Any] = {}
    masks: list[Tensor] = []
    if key_padding_mask is not None:
        if key_padding_mask.dtype is torch.bool:
            present = ~key_padding_mask
            lengths = key_lengths(present)
            if lengths is None:
                masks.append(present[:, None, None])
            else:
                options["key_lengths"] = lengths
        else:
            masks.append(key_padding_mask[:, None, None])
    if is_causal and attn_mask is None:
        raise Refused("is_causal without attn_mask")  # which the original refuses with its own words
    if is_causal and query.shape[1] == key.shape[1]:
        options["is_causal"] = True
    elif attn_mask is not None:
        mask = ~attn_mask if attn_mask.dtype is torch.bool else attn_mask
        masks.append(mask if mask.dim() == 2 else mask.view(-1, heads, *mask.shape[1:]))
    if len(masks) == 2:
        if all(m.dtype is torch.bool for m in masks):
            masks = [masks[0] & masks[1]]
        else:
            masks = [sum(_additive(m) for m in masks)]  # type: ignore[list-item]
    if masks:
        options["attn_mask"] = masks[0]
    return options


def _additive(mask: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))


def _weights(attention: Any) -> str | None:
    tensors = (*attention._parameters.values(), *attention.out_proj._parameters.values())
    return next((reason for t in tensors if (reason := swap.unusual_tensor(t))), None)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    masks: _Masks,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """nn.MultiheadAttention on [B, S, E], then dropout and a residual."""
    heads, width, weight, bias = module.num_heads, module.embed_dim, module.in_proj_weight, module.in_proj_bias
    options = _mask_options(*masks, heads, query, key)

    def projected(t: Tensor, w: Tensor, first: int, last: int) -> Tensor:
        y = ops.linear(t, w, None if bias is None else bias[first * width : last * width])
        return y.view(*t.shape[:2], (last - first) * heads, module.head_dim)

    if weight is None:
        separate = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        q, k, v = (
            projected(t, w, i, i + 1).transpose(1, 2)
            for i, (t, w) in enumerate(zip((query, key, value), separate, strict=True))
        )
    elif query is key and key is value:
        q, k, v = split_heads(projected(query, weight, 0, 3), [heads] * 3)
    else:
        q = projected(query, weight[:width], 0, 1).transpose(1, 2)
        if key is value:
            k, v = split_heads(projected(key, weight[width:], 1, 3), [heads] * 2)
        else:
            k = projected(key, weight[width : 2 * width], 1, 2).transpose(1, 2)
            v = projected(value, weight[2 * width :], 2, 3).transpose(1, 2)
    y = ops.attention(q, k, v, dropout_p=module.dropout if module.training else 0.0, **options)
    out = module.out_proj
    return ops.linear(y.transpose(1, 2).flatten(2), out.weight, out.bias, dropout_p=dropout_p, residual=residual)


class FastMultiheadAttention(Fast):
    """With need_weights=False; other calls go to the original."""

    area = "attention"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not isinstance(module, nn.MultiheadAttention):
            return None
        if swap.original_class(module).forward is not nn.MultiheadAttention.forward:
            return "a subclass of MultiheadAttention with a forward of its own"
        if module.bias_k is not None or module.add_zero_attn:
            return "add_bias_kv or add_zero_attn"
        return _weights(module) or {}

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        reason = _weights(self)
        if need_weights:
            reason = "need_weights=True asks for the weights"
        elif not all(type(t) is Tensor and t.dim() == 3 for t in (query, key, value)):
            reason = "inputs that are not batched tensors"
        if swap.note(self, reason):
            try:
                return self._attend(query, key, value, (attn_mask, key_padding_mask, is_causal)), None
            except Refused as refused:
                swap.note(self, str(refused))
        return super().forward(  # type: ignore[misc]
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )

    def _attend(self: Any, query: Tensor, key: Tensor, value: Tensor, masks: _Masks) -> Tensor:
        if self.batch_first:
            return attend(self, query, key, value, masks)
        turned: dict[int, Tensor] = {}  # what was one tensor stays one
        for t in (query, key, value):
            turned.setdefault(id(t), t.transpose(0, 1))
        query, key, value = (turned[id(t)] for t in (query, key, value))
        return attend(self, query, key, value, masks).transpose(0, 1)


class _FastLayer(Fast):
    """What the encoder's and the decoder's layer share. Dropout and residual end each product."""

    area = "attention"
    _kind: Any
    _attentions: tuple[str, ...]
    _norms: tuple[str, ...]

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        if not isinstance(module, cls._kind):
            return None
        if swap.original_class(module).forward is not cls._kind.forward:
            return f"a subclass of {cls._kind.__name__} with a forward of its own"
        overridden = [
            name
            for name in ("_sa_block", "_mha_block", "_ff_block")
            if getattr(swap.original_class(module), name, None) is not getattr(cls._kind, name, None)
        ]
        if overridden:
            return f"a subclass with {overridden[0]} of its own"
        activation = probe.activation(module.activation)
        if activation is None:
            return "an activation that is not known"
        return _not_fusible(module, cls) or {"activation": activation}

    def _add_attention(
        self: Any, name: str, x: Tensor, over: Tensor, memory: Tensor, dropout: nn.Module, masks: _Masks
    ) -> Tensor:
        attention = self._modules[name]
        p = swap.active_dropout(dropout)
        if attention.batch_first:
            return attend(attention, over, memory, memory, masks, p, x)
        over_b, x_b = over.transpose(0, 1), x.transpose(0, 1)
        memory_b = over_b if memory is over else memory.transpose(0, 1)
        return attend(attention, over_b, memory_b, memory_b, masks, p, x_b).transpose(0, 1)

    def _add_mlp(self: Any, x: Tensor, over: Tensor, dropout: nn.Module) -> Tensor:
        inner, outer = swap.active_dropout(self.dropout), swap.active_dropout(dropout)
        return dense_mlp(over, [self.linear1, self.linear2], plan(self)["activation"], inner, outer, residual=x)

    def _run(self: Any, x: Tensor, steps: list[Any]) -> Tensor:
        """Each step adds to x what it makes of its second argument; a norm goes before or after."""
        for step, norm in zip(steps, self._norms, strict=True):
            x = step(x, self._modules[norm](x)) if self.norm_first else self._modules[norm](step(x, x))
        return x


def _not_fusible(module: Any, kind: type[_FastLayer]) -> str | None:
    forwards: list[Any] = [(n, module._modules.get(n), nn.MultiheadAttention.forward) for n in kind._attentions]
    forwards += [(n, module._modules.get(n), nn.Linear.forward) for n in ("linear1", "linear2")]
    names = ("dropout", *(f"dropout{i + 1}" for i in range(len(kind._norms))))
    forwards += [(n, module._modules.get(n), nn.Dropout.forward) for n in names]
    if reason := swap.first_not_plain(module, tuple(forwards)):
        return reason
    for name in kind._attentions:
        attention = module._modules[name]
        if attention.bias_k is not None or attention.add_zero_attn:
            return f"{name} has add_bias_kv or add_zero_attn"
        if reason := _weights(attention):
            return f"{name}: {reason}"
    return None


class FastEncoderLayer(_FastLayer):
    _kind, _attentions, _norms = nn.TransformerEncoderLayer, ("self_attn",), ("norm1", "norm2")

    def forward(
        self: Any,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        reason = _not_fusible(self, FastEncoderLayer)
        if type(src) is not Tensor or src.dim() != 3 or src.is_nested:
            reason = "an input that is not a batched tensor"
        if swap.note(self, reason):
            masks = (src_mask, src_key_padding_mask, is_causal)
            try:
                return self._run(
                    src,
                    [
                        lambda x, over: self._add_attention("self_attn", x, over, over, self.dropout1, masks),
                        lambda x, over: self._add_mlp(x, over, self.dropout2),
                    ],
                )
            except Refused as refused:
                swap.note(self, str(refused))
        return super().forward(src, src_mask, src_key_padding_mask, is_causal)  # type: ignore[misc]


class FastDecoderLayer(_FastLayer):
    _kind = nn.TransformerDecoderLayer
    _attentions, _norms = ("self_attn", "multihead_attn"), ("norm1", "norm2", "norm3")

    def forward(
        self: Any,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        reason = _not_fusible(self, FastDecoderLayer)
        if not all(type(t) is Tensor and t.dim() == 3 for t in (tgt, memory)):
            reason = "inputs that are not batched tensors"
        if swap.note(self, reason):
            masks = (tgt_mask, tgt_key_padding_mask, tgt_is_causal)
            cross = (memory_mask, memory_key_padding_mask, memory_is_causal)
            try:
                return self._run(
                    tgt,
                    [
                        lambda x, over: self._add_attention("self_attn", x, over, over, self.dropout1, masks),
                        lambda x, over: self._add_attention("multihead_attn", x, over, memory, self.dropout2, cross),
                        lambda x, over: self._add_mlp(x, over, self.dropout3),
                    ],
                )
            except Refused as refused:
                swap.note(self, str(refused))
        return super().forward(  # type: ignore[misc]
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )

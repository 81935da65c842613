"""Attention in transformers models: a function and a mask of ours under a name of ours, chosen by one model's config.

transformers looks both up by `config._attn_implementation`. Its registries get one more entry, which no other model
asks for; the model gets a copy of its config that does.
"""

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from .. import _dispatch, ops
from ..ops.attention import allowed_mask
from . import packing, swap
from .transformer import key_lengths

NAME = "bigmodel_fast"
_REPLACES = ("eager", "sdpa", None)
_IMPLEMENTATION = "_attn_implementation_internal"  # in a config's __dict__
_CONFIG = "_bmf_config"  # in a module's __dict__: the config it had, and the copy it has
_SIGHT = "_bmf_sight"  # on a mask: its version, and the same as arguments of ops.attention


# ---- which models ----


def is_class(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a module's class is one of transformers' of these names."""
    cls = swap.original_class(module)
    return cls.__name__ in names and cls.__module__.startswith("transformers.")


def is_pretrained(module: nn.Module) -> bool:
    """A model of transformers, which need not be installed to ask."""
    transformers = sys.modules.get("transformers.modeling_utils")
    return transformers is not None and isinstance(module, transformers.PreTrainedModel)


def refusal(model: Any) -> str | None:
    """Why a model's attention does not go through the interface; None if it does."""
    if not (getattr(model, "_supports_attention_backend", False) or getattr(model, "_supports_sdpa", False)):
        return "its attention does not go through transformers' interface"
    if model.config._attn_implementation not in (*_REPLACES, NAME):
        return f"attention by {model.config._attn_implementation} was asked for"
    if getattr(model.config, "reorder_and_upcast_attn", False):
        return "reorder_and_upcast_attn"
    return None


def enable(model: nn.Module) -> None:
    """Gives the modules of a model copies of their configs that name our attention."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if getattr(config, "_attn_implementation", NAME) not in _REPLACES:
            continue
        if id(config) not in copies:
            copies[id(config)] = copied = copy.copy(config)
            copied.__dict__[_IMPLEMENTATION] = NAME
        module.__dict__[_CONFIG] = config, copies[id(config)]
        module.__dict__["config"] = copies[id(config)]


def enabled(module: Any) -> bool:
    """Whether a module's attention is ours at present."""
    return getattr(module.__dict__.get("config"), "_attn_implementation", None) == NAME


def disable(model: nn.Module) -> None:
    """The configs there were, with what was changed in their copies since."""
    for module in model.modules():
        if _CONFIG not in module.__dict__:
            continue
        original, copied = module.__dict__.pop(_CONFIG)
        if module.__dict__["config"] is not copied:
            continue  # someone gave it another one
        for name, value in copied.__dict__.items():
            ours = name == _IMPLEMENTATION and value == NAME
            if not ours and (name not in original.__dict__ or original.__dict__[name] is not value):
                original.__dict__[name] = value
        module.__dict__["config"] = original


def has_hooks(module: nn.Module) -> bool:
    """Hooks that look at a module's tensors; those by which transformers collects outputs sleep when not asked."""
    if not swap.hooked(module):
        return False
    capturing = sys.modules.get("transformers.utils.output_capturing")
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values(), *module._backward_hooks.values()]
    hooks += module._backward_pre_hooks.values()
    return any(capturing is None or getattr(hook, "__module__", None) != capturing.__name__ for hook in hooks)


def watched(module: nn.Module) -> bool:
    """Whether a module has to be called, and by its own forward."""
    return swap.all_hooked() is not None or swap.watched(module, has_hooks) is not None


# ---- what is registered ----


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it: heads [B, H, S, D] to [B, S, H, D], and weights where they are asked for.

    Groups of heads share keys without a copy; padding at the end, windows and causality skip what they hide.
    """
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(is_causal) and attention_mask is None and query.shape[2] > 1
    reason = None
    if weights_wanted(kwargs):
        reason = "output_attentions=True asks for the weights"
    elif kwargs.get("s_aux") is not None:
        reason = "attention sinks"
    elif key.shape != value.shape or key.shape[-1] != query.shape[-1]:
        reason = "values of another width than keys"
    if reason is not None:
        _dispatch.use_native("attention", reason, query)
        options = {"dropout": dropout, "scaling": scaling, "softcap": softcap, "position_bias": position_bias}
        given = {name: option for name, option in options.items() if option is not None}
        return _by_original(module, query, key, value, attention_mask, causal, {**given, **kwargs})
    bounds = packing.boundaries(attention_mask)
    if bounds is not None:  # of an encoder: windows reach to both sides
        window = None if sliding_window is None else sliding_window - 1
        options = {"dropout_p": dropout, "scale": scaling, "softcap": softcap, "window": window}
        options["enable_gqa"] = query.shape[1] != key.shape[1]
        key, value = key.to(query.dtype), value.to(query.dtype)
        if position_bias is not None:
            return _packed_biased(query, key, value, attention_mask, position_bias, **options), None
        return _packed(query, key, value, bounds, **options), None
    if causal and key.shape[2] > query.shape[2]:  # a cache with room behind what it holds
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
    sight = sight_of(attention_mask) or {"is_causal": causal, "attn_mask": attention_mask}
    if position_bias is not None:
        position_bias = position_bias[..., : key.shape[2]]
        mask = sight.get("attn_mask")
        if mask is not None and mask.dtype is torch.bool:
            position_bias = position_bias.masked_fill(~mask, float("-inf"))
        elif mask is not None:
            position_bias = position_bias + mask
        sight = {**sight, "attn_mask": position_bias}
    y = ops.attention(
        query,
        key.to(query.dtype),
        value.to(query.dtype),
        dropout_p=dropout,
        scale=scaling,
        softcap=softcap,
        enable_gqa=query.shape[1] != key.shape[1],
        **sight,
    )
    return y.transpose(1, 2).contiguous(), None


def _packed(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, **options: Any) -> Tensor:
    """Attention within the sequences of a packed batch, [1, H, T, D] to [1, T, H, D].

    query may also hold the first token of each sequence alone, [1, H, B, D].
    """
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    first_only = len(q) != len(k)
    begins = torch.arange(len(bounds), device=bounds.device) if first_only else bounds
    longest = int(bounds.diff().max()) if query.is_cuda else None
    return ops.attention_varlen(q, k, v, begins, bounds, 1 if first_only else longest, longest, **options)[None]


def _packed_biased(
    query: Tensor, key: Tensor, value: Tensor, mask: Any, position_bias: Tensor, **options: Any
) -> Tensor:
    """The same with a bias [1, H, S, S] by position in a sequence, for which sequences are padded."""
    q, k, v = (packing.pad(t.transpose(1, 2), mask).transpose(1, 2) for t in (query, key, value))
    lengths = packing.boundaries(mask).diff()  # type: ignore[union-attr]
    y = ops.attention(q, k, v, attn_mask=position_bias, key_lengths=lengths, **options)
    return packing.pack(y.transpose(1, 2), mask)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' boolean mask, or None where causality says it all; with what it amounts to, where known."""
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, local_size=local_size, **kwargs
    )
    if mask is not None and mask.is_cpu and not torch.compiler.is_compiling():
        sight = _sight(mask, local_size)
        if sight is not None:
            setattr(mask, _SIGHT, (mask._version, sight))
    return mask


def first_query(mask: Tensor | None) -> Tensor | None:
    """A mask for the first query of each sequence; keys may be hidden by their length only."""
    if mask is None or packing.boundaries(mask) is not None:
        return mask
    first = mask[:, :, :1]
    sight = sight_of(mask)
    if sight is not None and not sight["is_causal"] and sight["window"] is None:
        setattr(first, _SIGHT, (first._version, sight))
    return first


def sight_of(mask: Tensor | None) -> dict[str, Any] | None:
    """The arguments of ops.attention that a mask amounts to, if that is known and the mask is still what it was."""
    version, sight = getattr(mask, _SIGHT, (None, None))
    return sight if mask is not None and version == mask._version else None


def _sight(mask: Tensor, local_size: int | None) -> dict[str, Any] | None:
    """The arguments of ops.attention that hide the same keys as a mask [B, 1, S_q, S_k]; None if there are none."""
    queries, keys = mask.shape[-2:]
    lengths = key_lengths(mask.any(dim=2)[:, 0])
    if lengths is None:
        return None
    known: list[dict[str, Any]] = [{"is_causal": False}, {"is_causal": True}]
    if local_size is not None:
        known += [{"is_causal": True, "window": (local_size - 1, 0)}, {"is_causal": False, "window": local_size}]
    for options in known:
        options = {"window": None, **options, "key_lengths": lengths}
        same = allowed_mask(queries, keys, device=mask.device, **options)
        if same is not None and torch.equal(mask, same.expand_as(mask)):
            return options
    return None


def weights_wanted(kwargs: dict[str, Any]) -> bool:
    if kwargs.get("output_attentions"):
        return True
    capturing = sys.modules.get("transformers.utils.output_capturing")  # what hooks collect during this call
    active = getattr(capturing, "_active_collector", None)
    collected = None if active is None or torch.compiler.is_compiling() else active.get()
    return bool(collected is not None and any("attentions" in key for key in collected))


def _by_original(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The model's own eager attention, with an additive mask."""
    if causal:
        mask = allowed_mask(
            query.shape[2], key.shape[2], is_causal=True, window=None, key_lengths=None, device=query.device
        )
    if mask is not None and mask.dtype is torch.bool:
        hidden = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        mask = hidden.masked_fill_(~mask, torch.finfo(query.dtype).min)
    for cls in type(module).__mro__:
        if eager := getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None):
            return eager(module, query, key, value, mask, **options)
    raise RuntimeError(
        f"accelerate: {type(module).__module__} has no eager_attention_forward; call with "
        "output_attentions=False, or restore() the model first"
    )

"""attention: softmax(scale Q K^T + bias, masked) V per head (Vaswani et al. 2017)."""

import math

import torch
from torch import Tensor

from .. import _dispatch
from . import _attention, _checks
from ._attention import Window


def allowed_mask(
    queries: int,
    keys: int,
    *,
    is_causal: bool,
    window: Window,
    key_lengths: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Which key each query may see: bool [B or 1, 1, queries, keys], or None for all. Aligned bottom right."""
    position = torch.arange(queries, device=device)[:, None] + (keys - queries)
    key = torch.arange(keys, device=device)[None, :]
    mask = None
    if is_causal:
        mask = key <= position
    if window is not None:
        left, right = (window, window) if isinstance(window, int) else window
        band = (key >= position - left) & (key <= position + right)
        mask = band if mask is None else mask & band
    mask = None if mask is None else mask[None, None]
    if key_lengths is not None:
        present = key[None, None] < key_lengths.to(device)[:, None, None, None]
        mask = present if mask is None else mask & present
    return mask


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Plain torch; the scores in float32 at least."""
    compute = torch.promote_types(query.dtype, torch.float32)
    if enable_gqa:
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query.to(compute) * scale) @ key.to(compute).transpose(-2, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    queries, keys = scores.shape[-2:]
    if alibi_slopes is not None:
        position = torch.arange(queries, device=scores.device)[:, None] + (keys - queries)
        distance = (position - torch.arange(keys, device=scores.device)[None, :]).abs()
        scores = scores - alibi_slopes.to(compute).view(-1, scores.shape[1], 1, 1) * distance
    mask = allowed_mask(
        queries, keys, is_causal=is_causal, window=window, key_lengths=key_lengths, device=scores.device
    )
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            mask = attn_mask if mask is None else mask & attn_mask
        else:
            scores = scores + attn_mask.to(compute)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    # A row without any allowed key is all -inf: its maximum is replaced by 0, its weights become 0, not NaN.
    top = scores.amax(dim=-1, keepdim=True).detach() if keys else scores.new_zeros((*scores.shape[:-1], 1))
    weights = torch.exp(scores - top.masked_fill(top == -math.inf, 0.0))
    total = weights.sum(dim=-1, keepdim=True)
    weights = weights / total.masked_fill(total == 0, 1.0)
    weights = torch.nn.functional.dropout(weights, dropout_p)
    return (weights @ value.to(compute)).to(query.dtype)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
    """Attention per head: softmax(scale Q K^T + mask) V, as torch's scaled_dot_product_attention and more.

    Queries are aligned with the last keys: query i of S_q stands at key position i + S_k - S_q. That is
    FlashAttention's rule; SDPA's `is_causal` counts from the first key, which is the same where S_q equals S_k. A query
    that may see no key gives zeros, and has no gradient.

    Args:
        query: [B, H, S_q, D], any strides; float32, bfloat16 or (by reference) another floating dtype.
        key: [B, H_kv, S_k, D].
        value: [B, H_kv, S_k, D].
        attn_mask: broadcastable to [B, H, S_q, S_k]; bool (True: may be seen) or added to the scores, with a gradient.
        is_causal: a query sees no key behind its own position.
        dropout_p: share of the softmax's weights that are dropped, drawn from torch's generator.
        scale: of the scores; None: 1 / sqrt(D).
        enable_gqa: H may be a multiple of H_kv; neighbouring heads share one of key and value.
        window: a query sees keys at most so far from its position: one number, or (to the left, to the right).
        softcap: scores become softcap * tanh(scores / softcap) before the mask is added (Gemma 2).
        alibi_slopes: [H] or [B, H]; slope * distance is taken off the scores (Press et al. 2022). No gradient.
        key_lengths: [B], int32 or int64: how many keys of each batch there are; those behind cost nothing.

    Returns:
        [B, H, S_q, D] in query's dtype (autocast's within an autocast region), which in memory is [B, S_q, H, D].

    Raises:
        TypeError: an argument is no tensor of its kind.
        ValueError: shapes, dtypes or devices do not fit together, or an option is out of range.
    """
    op = "attention"
    query, key, value = _attention.check_operands(op, query, key, value, enable_gqa, 4, "[B, H, S, D]")
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    if key.shape[0] != batch:
        raise ValueError(f"{op}: key must have query's batch of {batch}, got {_checks.describe(key)}")
    if attn_mask is not None:
        _attention.check_mask(op, attn_mask, query, (batch, heads, queries, keys))
    if key_lengths is not None:
        _attention.check_lengths(op, "key_lengths", key_lengths, batch, keys)
    sight = _attention.check_options(op, query, dropout_p, scale, softcap, window, is_causal, alibi_slopes, batch)
    reason = _attention.uncovered(query, key, value, dropout_p)
    if reason is None and attn_mask is not None and attn_mask.dtype is not torch.bool:
        reason = _dispatch.unsupported(attn_mask)
    if not _dispatch.use_native(op, reason, query):
        return reference(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            dropout_p=dropout_p,
            scale=scale,
            enable_gqa=enable_gqa,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            key_lengths=key_lengths,
        )
    return _attention.apply(
        query,
        key,
        value,
        bias=attn_mask,
        alibi_slopes=alibi_slopes,
        key_lengths=key_lengths,
        dropout_p=dropout_p,
        scale=scale,
        softcap=softcap,
        sight=sight,
    )

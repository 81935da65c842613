"""attention: softmax(scale Q K^T + bias, masked) V per head (Vaswani et al. 2017)."""

import math

import torch
from torch import Tensor


def allowed_mask(
    queries: int,
    keys: int,
    *,
    is_causal: bool,
    window: int | tuple[int, int] | None,
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
    window: int | tuple[int, int] | None = None,
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
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> Tensor:
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


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options,
) -> Tensor:
    """Attention within each packed sequence. query, key, value: [tokens, H, D]; cu_seqlens: [sequences + 1]."""
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = [
        attention(
            query[q0:q1].transpose(0, 1)[None],
            key[k0:k1].transpose(0, 1)[None],
            value[k0:k1].transpose(0, 1)[None],
            **options,
        )[0].transpose(0, 1)
        for q0, q1, k0, k1 in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False)
    ]
    return torch.cat(parts)

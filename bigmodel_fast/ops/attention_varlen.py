"""attention_varlen: attention within each of several sequences packed one after the other, without padding."""

import torch
from torch import Tensor

from .. import _dispatch
from . import _attention, _checks
from ._attention import Window
from .attention import reference as attention_reference


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    **options,
) -> Tensor:
    """Plain torch, one sequence after the other; its options are those of attention_varlen."""

    def heads_first(t: Tensor, begin: int, end: int) -> Tensor:
        return t[begin:end].transpose(0, 1)[None]

    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    parts = [
        attention_reference(
            heads_first(query, q, q_end), heads_first(key, k, k_end), heads_first(value, k, k_end), **options
        )
        for q, q_end, k, k_end in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True)
    ]
    return torch.cat([query[:0], *(part[0].transpose(0, 1) for part in parts)])


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    is_causal: bool = False,
    dropout_p: float = 0.0,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> Tensor:
    """Attention within each of several sequences that are packed one after the other, without padding.

    Sequence i has tokens cu_seqlens[i] to cu_seqlens[i + 1]. The other arguments are `attention`'s.

    Args:
        query: [tokens_q, H, D], any strides.
        key: [tokens_k, H_kv, D].
        value: [tokens_k, H_kv, D].
        cu_seqlens_q: [sequences + 1], int32 or int64, rising from 0 to tokens_q.
        cu_seqlens_k: [sequences + 1], rising from 0 to tokens_k.
        max_seqlen_q: the longest sequence's length; the kernels on CPU do not need it.
        max_seqlen_k: likewise.

    Returns:
        [tokens_q, H, D] in query's dtype (autocast's within an autocast region).

    Raises:
        TypeError: an argument is no tensor of its kind.
        ValueError: shapes, dtypes or devices do not fit together, or an option is out of range.
    """
    op = "attention_varlen"
    query, key, value = _attention.check_operands(op, query, key, value, enable_gqa, 3, "[tokens, H, D]")
    _attention.check_boundaries(op, "cu_seqlens_q", cu_seqlens_q, query.shape[0])
    _attention.check_boundaries(op, "cu_seqlens_k", cu_seqlens_k, key.shape[0])
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"{op}: cu_seqlens_k must have cu_seqlens_q's shape {list(cu_seqlens_q.shape)}, "
            f"got {_checks.describe(cu_seqlens_k)}"
        )
    sight = _attention.check_options(op, query, dropout_p, scale, softcap, window, is_causal, alibi_slopes, None)
    if not _dispatch.use_native(op, _attention.uncovered(query, key, value, dropout_p), query):
        return reference(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            is_causal=is_causal,
            dropout_p=dropout_p,
            scale=scale,
            enable_gqa=enable_gqa,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
        )
    return _attention.apply(
        query,
        key,
        value,
        alibi_slopes=alibi_slopes,
        cu_seqlens=(cu_seqlens_q, cu_seqlens_k),
        dropout_p=dropout_p,
        scale=scale,
        softcap=softcap,
        sight=sight,
    )

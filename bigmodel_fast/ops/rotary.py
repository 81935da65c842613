"""rotary: each pair (t_i, t_{i+D/2}) of query and key turned by the angle of its position (Su et al. 2021)."""

import torch
from torch import Tensor

from .. import _dispatch
from . import _checks
from ._autograd import apply


def _rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = t.chunk(2, dim=-1)
    return (t * cos + torch.cat((-second, first), dim=-1) * sin).to(t.dtype)


def reference(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch. query, key: [B, H, S, D]; cos, sin: [S, D] or [B, S, D]."""
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


@torch.library.register_fake("bigmodel_fast::rotary_fwd")
def _(query, key, cos, sin, inverse):
    return tuple(t.new_empty([t.shape[i] for i in (0, 2, 1, 3)]).transpose(1, 2) for t in (query, key))


class _Rotary(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(query, key, cos, sin, inverse):
        return torch.ops.bigmodel_fast.rotary_fwd(query, key, cos, sin, inverse)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, _, cos, sin, ctx.inverse = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx, grad_query, grad_key):
        return *apply(_Rotary, grad_query, grad_key, *ctx.saved_tensors, not ctx.inverse), None, None, None


def _fallback_reason(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if cos.requires_grad or sin.requires_grad:
        return "gradients of cos and sin"
    return _dispatch.unsupported(query, key, cos, sin)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of query and key, in the half-split convention (pairs are D/2 apart).

    Args:
        query: [B, H, S, D], any strides, D even.
        key: [B, H_kv, S, D]; the number of heads may differ from query's.
        cos, sin: [S, D] or [B, S, D] (or [1, S, D]), of one dtype, usually float32.

    Returns:
        query and key rotated, each in its own dtype; in memory they lie as [B, S, H, D].

    Raises:
        TypeError: an argument is no floating-point tensor, or cos and sin differ in dtype.
        ValueError: shapes or devices do not fit together.
    """
    _checks.floating("rotary", query=query, key=key, cos=cos, sin=sin)
    _checks.ndim("rotary", "query", query, 4, "[B, H, S, D]")
    _checks.ndim("rotary", "key", key, 4, "[B, H, S, D]")
    b, _, s, d = query.shape
    if d % 2:
        raise ValueError(f"rotary: query must have an even last dimension, got {_checks.describe(query)}")
    _checks.shape("rotary", "key", key, (b, key.shape[1], s, d), "(query's, but for the heads)")
    if tuple(cos.shape) not in ((s, d), (b, s, d), (1, s, d)):
        raise ValueError(f"rotary: cos must have shape {[s, d]} or {[b, s, d]}, got {_checks.describe(cos)}")
    _checks.shape("rotary", "sin", sin, tuple(cos.shape), "(cos's shape)")
    if cos.dtype != sin.dtype:
        raise TypeError(f"rotary: cos and sin must have one dtype, got {cos.dtype} and {sin.dtype}")
    if not _dispatch.use_native("rotary", _fallback_reason(query, key, cos, sin), query):
        return reference(query, key, cos, sin)
    return apply(_Rotary, query, key, cos, sin, False)

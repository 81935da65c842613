"""What attention and attention_varlen share: argument checks, the fake kernels, and the way to the kernels."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _autograd, _checks, _cuda, _dense

Window = int | tuple[int, int] | None

EVERYTHING = 1 << 40  # a distance no sequence reaches
_CUDA_MOST_DIM = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}  # sums and operands fill the registers


@torch.library.register_fake("bigmodel_fast::attention_fwd")
def _fake_forward(query, key, value, bias, alibi_slopes, key_lengths, cu_seqlens_q, cu_seqlens_k, seed, *options):
    if query.dim() == 3:
        tokens, heads, _ = query.shape
        return query.new_empty(query.shape), query.new_empty((heads, tokens, 2), dtype=torch.float32)
    return _empty_heads(query), query.new_empty((*query.shape[:3], 2), dtype=torch.float32)


@torch.library.register_fake("bigmodel_fast::attention_bwd")
def _fake_backward(grad_out, query, key, value, *options):
    *_, bias_shape, packed = options
    grad_bias = query.new_empty(bias_shape or (0,), dtype=torch.float32)
    if packed:
        b, h, s, d = query.shape
        return query.new_empty((b, s, h + 2 * key.shape[1], d)), query.new_empty(0), query.new_empty(0), grad_bias
    return *(_empty_heads(t) if t.dim() == 4 else t.new_empty(t.shape) for t in (query, key, value)), grad_bias


if _cuda.BUILT:  # what these are given last is a stream
    torch.library.register_fake("bigmodel_fast::attention_fwd_cuda", lambda *a: _fake_forward(*a[:-1]))
    torch.library.register_fake("bigmodel_fast::attention_bwd_cuda", lambda *a: _fake_backward(*a[:-1]))


def _empty_heads(t: Tensor) -> Tensor:
    """As t in shape, in memory [B, S, H, D]."""
    b, h, s, d = t.shape
    return t.new_empty((b, s, h, d)).transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(query, key, value, bias, alibi_slopes, key_lengths, query_starts, key_starts, seed, options):
        expanded = None
        if bias is not None:
            expanded = bias.expand(*query.shape[:3], key.shape[2])
        tensors = alibi_slopes, key_lengths, query_starts, key_starts, seed
        return torch.ops.bigmodel_fast.attention_fwd(query, key, value, expanded, *tensors, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.options = inputs
        out, stats = output
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[:4], out, stats, *tensors[4:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, _):
        nothing = (None,) * 6
        if grad_out is None:
            return None, None, None, None, *nothing
        query, key, value, bias, out, stats, *tensors = ctx.saved_tensors
        expanded = None if bias is None else bias.expand(*query.shape[:3], key.shape[2])
        wants_bias = ctx.needs_input_grad[3]
        shape = (1,) * (4 - bias.dim()) + tuple(bias.shape) if wants_bias else ()
        packed = query.dim() == 4 and query.shape[2] == key.shape[2] and not torch.compiler.is_compiling()
        packed = packed and not hasattr(query, "to_local")  # the parts of a DTensor are apart
        grad_query, grad_key, grad_value, grad_bias = torch.ops.bigmodel_fast.attention_bwd(
            grad_out, query, key, value, out, stats, expanded, *tensors, *ctx.options, shape, packed
        )
        if packed:
            heads = [query.shape[1], key.shape[1], key.shape[1]]
            grad_query, grad_key, grad_value = (t.transpose(1, 2) for t in grad_query.split(heads, dim=2))
        grad_bias = grad_bias.view(bias.shape).to(bias.dtype) if wants_bias else None
        return grad_query, grad_key, grad_value, grad_bias, *nothing


def check_operands(
    op: str, query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool, ndim: int, layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Shapes and dtypes that fit together; returns them as autocast wants them."""
    _checks.floating(op, query=query, key=key, value=value)
    for name, t in (("query", query), ("key", key), ("value", value)):
        _checks.ndim(op, name, t, ndim, layout)
    heads, key_heads = query.shape[1], key.shape[1]
    if key.shape[-1] != query.shape[-1] or query.shape[-1] == 0:
        raise ValueError(
            f"{op}: key must have query's head dimension {query.shape[-1]} (of at least 1), got {_checks.describe(key)}"
        )
    _checks.shape(op, "value", value, tuple(key.shape), "(key's shape)")
    if not enable_gqa and key_heads != heads:
        raise ValueError(
            f"{op}: key must have query's {heads} heads unless enable_gqa is set, got {_checks.describe(key)}"
        )
    if (key_heads == 0) != (heads == 0) or (key_heads and heads % key_heads):
        raise ValueError(f"{op}: query's {heads} heads must be a multiple of key's, got {_checks.describe(key)}")
    dtype = _checks.autocast_dtype(query)
    for name, t in (("key", key), ("value", value)):
        if dtype is None and t.dtype != query.dtype:
            raise TypeError(f"{op}: {name} must be {query.dtype} like query, got {_checks.describe(t)}")
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return query, key, value


def check_mask(op: str, mask: Tensor, query: Tensor, full: Sequence[int]) -> None:
    if not isinstance(mask, Tensor) or not (mask.dtype is torch.bool or mask.is_floating_point()):
        raise TypeError(f"{op}: attn_mask must be a tensor of bool or floating point, got {_checks.describe(mask)}")
    if mask.device != query.device:
        raise ValueError(f"{op}: attn_mask must be on {query.device} like query, got {_checks.describe(mask)}")
    fits = mask.dim() <= 4 and all(m in (1, n) for m, n in zip(reversed(mask.shape), reversed(full), strict=False))
    if not fits:
        raise ValueError(f"{op}: attn_mask must be broadcastable to {list(full)}, got {_checks.describe(mask)}")


def _values(op: str, name: str, t: Tensor) -> list[int] | None:
    """What `t` holds; None where reading it would wait for the device or break the graph. The kernels check too."""
    if not isinstance(t, Tensor) or t.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: {name} must be a tensor of int32 or int64, got {_checks.describe(t)}")
    if t.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    return t.tolist()


def check_lengths(op: str, name: str, t: Tensor, batch: int, most: int) -> None:
    values = _values(op, name, t)
    _checks.shape(op, name, t, (batch,), "(one for each batch)")
    if values is not None and not all(0 <= n <= most for n in values):
        raise ValueError(f"{op}: {name} must lie in [0, {most}], got {values}")


def check_boundaries(op: str, name: str, t: Tensor, tokens: int) -> None:
    values = _values(op, name, t)
    if t.dim() != 1 or t.shape[0] == 0:
        raise ValueError(f"{op}: {name} must have shape [sequences + 1], got {_checks.describe(t)}")
    if values is None:
        return
    if values[0] != 0 or values[-1] != tokens or any(b < a for a, b in itertools.pairwise(values)):
        raise ValueError(f"{op}: {name} must rise from 0 to the number of tokens, {tokens}, got {values}")


def check_options(
    op: str,
    query: Tensor,
    dropout_p: float,
    scale: float | None,
    softcap: float | None,
    window: Window,
    is_causal: bool,
    alibi_slopes: Tensor | None,
    batch: int | None,
) -> tuple[int, int]:
    """Options are in range; returns how far a query sees to the left and to the right."""
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: dropout_p must lie in [0, 1], got {dropout_p!r}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale!r}")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"{op}: softcap must be positive, got {softcap!r}")
    left = right = EVERYTHING
    if window is not None:
        sides = (window, window) if isinstance(window, int) else tuple(window)
        if len(sides) != 2 or not all(isinstance(n, int) and n >= 0 for n in sides):
            raise ValueError(f"{op}: window must be a number of keys or (left, right), 0 or more, got {window!r}")
        left, right = (min(n, EVERYTHING) for n in sides)
    if alibi_slopes is not None:
        _checks.floating(op, query=query, alibi_slopes=alibi_slopes)
        heads = query.shape[1]
        shapes = [(heads,)] if batch is None else [(heads,), (batch, heads)]
        if tuple(alibi_slopes.shape) not in shapes:
            expected = " or ".join(str(list(s)) for s in shapes)
            raise ValueError(f"{op}: alibi_slopes must have shape {expected}, got {_checks.describe(alibi_slopes)}")
    return left, 0 if is_causal else right


def uncovered(query: Tensor, key: Tensor, value: Tensor, dropout_p: float) -> str | None:
    if dropout_p == 1.0:
        return "everything is dropped"
    reason = _dispatch.unsupported(query, key, value)
    if reason is None and query.is_cuda and query.shape[-1] > _CUDA_MOST_DIM[query.dtype]:
        reason = f"no kernel for a head dimension of {query.shape[-1]}"
    if reason is None and query.is_cuda and _dispatch.cuda_backend("attention") == "native":
        reason = None if query.element_size() == 2 else f"no CUDA C++ kernel for {query.dtype}"
    return reason


def apply(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None,
    key_lengths: Tensor | None = None,
    cu_seqlens: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    dropout_p: float,
    scale: float | None,
    softcap: float | None,
    sight: tuple[int, int],
) -> Tensor:
    """Runs the kernels on checked arguments. sight: how far a query sees to the left and to the right."""
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach().to(torch.float32).contiguous()
    seed = _dense.draw_seed(dropout_p, query.device)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    tensors = (query, key, value, bias, alibi_slopes, key_lengths, *cu_seqlens, seed)
    return _autograd.apply(_Attention, *tensors, (scale, softcap or 0.0, *sight, dropout_p))[0]

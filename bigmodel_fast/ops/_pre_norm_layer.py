"""pre_norm_layer: what comes after the first norm of a layer with norms before its parts (Xiong et al. 2020), and the
norm that follows the layer, all of it one function to autograd.

    a = stream + attention(normed) Wo^T + bo,    stream' = a + mlp(norm(a)),    normed' = norm_after(stream')

_layers.py says what for.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _attention, _dense, _layers


class Weights(NamedTuple):
    """Matrices [out, in], everything else [out]; None for a bias that a layer does not have."""

    qkv: Tensor  # of queries, keys and values, one after the other
    out: Tensor
    gate: Tensor | None  # of a gated MLP
    up: Tensor
    down: Tensor
    qkv_bias: Tensor | None
    out_bias: Tensor | None
    up_bias: Tensor | None  # None with a gate, as the next one
    down_bias: Tensor | None
    norm: Tensor
    norm_bias: Tensor | None
    norm_after: Tensor
    norm_after_bias: Tensor | None


_MATRICES = Weights._fields.index("qkv_bias")  # so many stand first


class Shape(NamedTuple):
    """What a layer is, beside its weights."""

    heads: int  # of queries
    head_dim: int
    is_causal: bool
    activation: str
    rms: bool  # norms are RMSNorms, without biases
    eps: float
    eps_after: float


def pre_norm_layer(
    normed: Tensor,
    stream: Tensor,
    weights: Weights,
    shape: Shape,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """The output of the norm after the layer and the stream it normed; None if the operators have to be called.

    Args:
        normed: [B, S, width], contiguous: the layer's first norm of the stream, in the dtype of the products.
        stream: [B, S, width], contiguous; float32 or as normed.
        rotation: cos and sin of rotary positions, [S, head_dim].

    Returns:
        As normed and stream in shape and dtype.
    """
    w, cos_sin = weights, rotation or (None, None)
    matrices, others = _given(w[:_MATRICES]), _given((*w[_MATRICES:], *cos_sin))
    dtype = _layers.compute_dtype([normed, stream], matrices, others)
    if dtype is None or normed.dtype is not dtype or normed.dim() != 3 or normed.shape != stream.shape:
        return None
    if not _fit(normed, w, shape, cos_sin) or _dense.needs_grad(*cos_sin):
        return None
    keeps = _dense.needs_grad(normed, stream, w.qkv, w.qkv_bias, w.out, w.out_bias)
    if not keeps and _dense.needs_grad(*w):
        return None  # backward ends before it comes to attention: operators keep only what it needs
    if not _dispatch.use_native("pre_norm_layer", None, normed):
        return None
    return _PreNormLayer.apply(normed, stream, *cos_sin, shape, keeps, *w)


def _fit(normed: Tensor, w: Weights, shape: Shape, cos_sin: tuple[Tensor | None, Tensor | None]) -> bool:
    """Whether sizes go together."""
    _, length, width = normed.shape
    hidden, query_width = len(w.up), shape.heads * shape.head_dim
    keys_values = len(w.qkv) - query_width
    if keys_values <= 0 or keys_values % (2 * shape.head_dim) or 2 * query_width % keys_values:
        return False
    return _layers.fit(
        [
            *((w.qkv, (len(w.qkv), width)), (w.qkv_bias, (len(w.qkv),))),
            *((w.out, (width, query_width)), (w.out_bias, (width,))),
            *((w.gate, (hidden, width)), (w.up, (hidden, width)), (w.up_bias, (hidden,))),
            *((w.down, (width, hidden)), (w.down_bias, (width,))),
            *((t, (width,)) for t in (w.norm, w.norm_bias, w.norm_after, w.norm_after_bias)),
            *((t, (length, shape.head_dim)) for t in cos_sin),
        ]
    )


def _given(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


class _PreNormLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        normed: Tensor,
        stream: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        shape: Shape,
        keeps: bool,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        call, w = torch.ops.bigmodel_fast, Weights(*weights)
        x, size = _dense.rows(normed), normed.shape
        qkv, _ = call.linear_fwd(x, w.qkv, _dense.wide(w.qkv_bias), "none", False)
        q, k, v = _layers.to_heads(qkv, shape.head_dim, size[0]).split(_heads(w, shape), dim=1)
        if cos is not None:
            q, k = call.rotary_fwd(q, k, cos, sin, False)
        options = (
            shape.head_dim**-0.5,
            0.0,
            _attention.EVERYTHING,
            0 if shape.is_causal else _attention.EVERYTHING,
            0.0,
        )
        attended, attention_stats = call.attention_fwd(q, k, v, *(None,) * 6, *options)
        projected, _ = call.linear_fwd(_layers.to_tokens(attended), w.out, _dense.wide(w.out_bias), "none", False)
        y, sum1, *stats1 = _norm_fwd(projected, _dense.rows(stream), w.norm, w.norm_bias, shape.eps, shape.rms)
        if w.gate is None:
            biases = _dense.wide(w.up_bias), _dense.wide(w.down_bias)
            added, pre = call.mlp_fwd(y, w.up, biases[0], w.down, biases[1], shape.activation, keeps)
            gate_pre = None
        else:
            added, gate_pre, pre = call.gated_mlp_fwd(y, w.gate, w.up, w.down, shape.activation, keeps)
        z, sum2, *stats2 = _norm_fwd(added, sum1, w.norm_after, w.norm_after_bias, shape.eps_after, shape.rms)
        z, sum2 = _dense.shaped(z, size), _dense.shaped(sum2, size)
        ctx.shape, ctx.options, ctx.dtypes = shape, options, _layers.dtypes_of(weights)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *(x, q, k, v, attended, attention_stats, sum1, *stats1, y, gate_pre, pre, sum2, *stats2),
            *(cos, sin, *_layers.without_biases(w)),
        )
        return z, sum2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor | None, dsum2: Tensor | None) -> Any:
        x, q, k, v, attended, attention_stats, sum1, mean1, rstd1, y, gate_pre, pre, sum2, mean2, rstd2, *rest = (
            ctx.saved_tensors
        )
        cos, sin, *weights = rest
        w, call, shape, size = Weights(*weights), torch.ops.bigmodel_fast, ctx.shape, sum2.shape
        wants = Weights(*ctx.needs_input_grad[-len(w) :])
        dz = torch.zeros_like(sum2) if dz is None else dz
        dsum2 = None if dsum2 is None else _dense.rows(dsum2)
        dsum2, dadded, dnorm_after, dnorm_after_bias = _norm_bwd(
            _dense.rows(dz), dsum2, _dense.rows(sum2), w.norm_after, mean2, rstd2, x.dtype
        )
        dgate = dup_bias = ddown_bias = None
        if w.gate is None:
            dy, dup, dup_bias, ddown, ddown_bias = call.mlp_bwd(
                *(dadded, y, w.up, w.down, pre, shape.activation),
                [True, wants.up, wants.up_bias, wants.down, wants.down_bias],
            )
        else:
            dy, dgate, dup, ddown = call.gated_mlp_bwd(
                *(dadded, y, w.gate, w.up, w.down, gate_pre, pre, shape.activation),
                [True, wants.gate, wants.up, wants.down],
            )
        dsum1, dprojected, dnorm, dnorm_bias = _norm_bwd(dy, dsum2, sum1, w.norm, mean1, rstd1, x.dtype)
        nothing = x.new_empty(0)
        dattended, dout, dout_bias = call.linear_bwd(
            *(dprojected, _layers.to_tokens(attended), w.out, nothing, "none"), [True, wants.out, wants.out_bias]
        )
        dqkv, *_ = call.attention_bwd(
            *(_layers.to_heads(dattended, shape.head_dim, size[0]), q, k, v, attended, attention_stats),
            *(*(None,) * 6, *ctx.options, (), True),
        )
        if cos is not None:
            dq, dk, dv = dqkv.split(_heads(w, shape), dim=2)
            dq, dk = call.rotary_fwd(dq.transpose(1, 2), dk.transpose(1, 2), cos, sin, True)
            dqkv = torch.cat([dq.transpose(1, 2), dk.transpose(1, 2), dv], dim=2)
        wants_normed, wants_stream = ctx.needs_input_grad[:2]
        dnormed, dqkv_weight, dqkv_bias = call.linear_bwd(
            *(dqkv.view(len(x), -1), x, w.qkv, nothing, "none"), [wants_normed, wants.qkv, wants.qkv_bias]
        )
        grads = Weights(
            *(dqkv_weight, dout, dgate, dup, ddown, dqkv_bias, dout_bias, dup_bias, ddown_bias),
            *(dnorm, dnorm_bias, dnorm_after, dnorm_after_bias),
        )
        return (
            dnormed.view(size) if wants_normed else None,
            dsum1.view(size) if wants_stream else None,
            *(None,) * 4,
            *_layers.of_weights(grads, ctx.dtypes, wants),
        )


def _heads(w: Weights, shape: Shape) -> list[int]:
    """How many of queries, keys and values there are."""
    keys = (len(w.qkv) // shape.head_dim - shape.heads) // 2
    return [shape.heads, keys, keys]


def _norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The normed sum in x's dtype, the sum, and of each row the mean (unless rms) and the reciprocal deviation."""
    if not rms:
        return torch.ops.bigmodel_fast.layer_norm_fwd(x, weight, bias, residual, eps, x.dtype)
    y, total, rstd = torch.ops.bigmodel_fast.rms_norm_fwd(x, weight, residual, eps, x.dtype)
    return y, total, None, rstd


def _norm_bwd(
    grad: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor | None,
    rstd: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the sum, of what was added to it (in `dtype`), of weight and bias."""
    if mean is not None:
        return _layers.layer_norm_bwd(grad, grad_sum, total, weight, mean, rstd, dtype)
    narrow = total.dtype is not dtype
    dtotal, dadded, dweight = torch.ops.bigmodel_fast.rms_norm_bwd(grad, grad_sum, total, weight, rstd, narrow)
    return dtotal, dadded if narrow else dtotal, dweight, None

"""encoder_layer: an encoder layer with norms behind its sums (Vaswani et al. 2017), all of it one function to autograd.

    y = norm1(x + dropout(attention(x) Wo^T + bo)),    z = norm2(y + dropout(mlp(y)))

It runs the kernels of the operators it is made of. What it saves is what lies between them: gradients are added where
they are made, and the stream is cast once for each product.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _checks, _dense

_SEES_ALL = (1 << 40, 1 << 40)  # keys to the left and to the right of a query


class Weights(NamedTuple):
    """Matrices [out, in], everything else [out]."""

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    query_bias: Tensor
    key_bias: Tensor
    value_bias: Tensor
    out_bias: Tensor
    up_bias: Tensor
    down_bias: Tensor
    norm1: Tensor
    norm1_bias: Tensor
    norm2: Tensor
    norm2_bias: Tensor


_MATRICES = Weights._fields.index("query_bias")  # so many stand first


class Shape(NamedTuple):
    """What a layer is, beside its weights."""

    head_dim: int
    scale: float  # of the scores
    activation: str
    eps1: float
    eps2: float
    attention_dropout: float  # 0 unless training, as the next ones
    dropout1: float  # of what attention adds to the stream
    dropout2: float  # of what the MLP adds


def encoder_layer(
    x: Tensor,
    weights: Weights,
    shape: Shape,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor | None:
    """The layer's output, as x in shape and dtype; None if the operators have to be called one by one.

    Args:
        x: [B, S, width], contiguous; or [..., width] with `starts`, the tokens of sequences one after the other.
        starts: [sequences + 1], int32 or int64, rising from 0 to the number of tokens.
        lengths: [B], int32 or int64: how many keys of each sequence there are.
    """
    dtype = _checks.autocast_dtype(x) or x.dtype
    if not x.is_cpu or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    if dtype not in (torch.float32, torch.bfloat16) or x.dtype not in (torch.float32, dtype) or not x.is_contiguous():
        return None
    if not all(type(t) in (Tensor, torch.nn.Parameter) for t in weights) or _dispatch.unsupported(*weights):
        return None
    kinds = {t.dtype for t in weights[:_MATRICES]}
    if kinds != {torch.float32} and kinds != {dtype}:
        return None
    dropouts = shape[-3:]
    name = "encoder_layer" if starts is None else "encoder_layer_varlen"
    if 1.0 in dropouts or not _dispatch.use_native(name, None, x):
        return None
    seeds: list[Tensor | None] = [None, None, None]
    if any(dropouts):
        drawn = torch.randint(1 << 62, (3, 1), dtype=torch.int64).unbind()
        seeds = [seed if p else None for seed, p in zip(drawn, dropouts, strict=True)]
    keeps = _dense.needs_grad(x, *weights)
    return _EncoderLayer.apply(x, starts, lengths, dtype, shape, seeds, keeps, *weights)


class _EncoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        starts: Tensor | None,
        lengths: Tensor | None,
        dtype: torch.dtype,
        shape: Shape,
        seeds: list[Tensor | None],
        keeps: bool,
        *weights: Tensor,
    ) -> Tensor:
        call, w = torch.ops.bigmodel_fast, Weights(*weights)
        stream = _dense.rows(x)
        narrow = stream.to(dtype)
        biases = [_dense.wide(w.query_bias), _dense.wide(w.key_bias), _dense.wide(w.value_bias)]
        qkv = call.linears_fwd(narrow, [w.query, w.key, w.value], biases)
        q, k, v = (_heads(t, x, shape, starts) for t in qkv)
        options = (shape.scale, 0.0, *_SEES_ALL, shape.attention_dropout)
        tensors = (None, lengths, starts, starts, seeds[0])
        attended, stats = call.attention_fwd(q, k, v, None, *tensors, *options)
        sum1, _ = call.linear_fwd(
            _tokens(attended, starts), w.out, _dense.wide(w.out_bias), "none", False, stream, seeds[1], shape.dropout1
        )
        if dtype is x.dtype:
            y, _, mean1, rstd1 = call.layer_norm_fwd(sum1, w.norm1, w.norm1_bias, None, shape.eps1, dtype)
            y_narrow = y
        else:
            y, y_narrow, mean1, rstd1 = call.layer_norm_twice_fwd(sum1, w.norm1, w.norm1_bias, shape.eps1)
        biases = [_dense.wide(w.up_bias), _dense.wide(w.down_bias)]
        sum2, pre = call.mlp_fwd(
            y_narrow, w.up, biases[0], w.down, biases[1], shape.activation, keeps, y, seeds[2], shape.dropout2
        )
        z, _, mean2, rstd2 = call.layer_norm_fwd(sum2, w.norm2, w.norm2_bias, None, shape.eps2, x.dtype)
        ctx.shape, ctx.dtype, ctx.options = shape, dtype, options
        ctx.save_for_backward(
            *(narrow, q, k, v, attended, stats, sum1, mean1, rstd1, y_narrow, pre, sum2, mean2, rstd2),
            *(lengths, starts, *seeds, *weights),
        )
        return z.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> Any:
        (narrow, q, k, v, attended, stats, sum1, mean1, rstd1, y_narrow, pre, sum2, mean2, rstd2, *rest) = (
            ctx.saved_tensors
        )
        lengths, starts, *seeds = rest[:5]
        w, call, shape, dtype = Weights(*rest[5:]), torch.ops.bigmodel_fast, ctx.shape, ctx.dtype
        wants = Weights(*ctx.needs_input_grad[-len(w) :])

        def norm_bwd(grad: Tensor, total: Tensor, weight: Tensor, stats: list[Tensor], seed: Any, p: float) -> Any:
            """Gradients of a norm's input, of what dropout was applied to before, of weight and bias."""
            if dtype is not torch.bfloat16 or total.dtype is dtype:
                dtotal, _, *others = call.layer_norm_bwd(grad, None, total, weight, *stats, False)
                return dtotal, _dense.before_finish(dtotal, seed, p, dtype), *others
            return call.layer_norm_bwd(grad, None, total, weight, *stats, True, seed, p)

        dsum2, dmlp, dnorm2, dnorm2_bias = norm_bwd(
            _dense.rows(dz), sum2, w.norm2, [mean2, rstd2], seeds[2], shape.dropout2
        )
        dy, dup, dup_bias, ddown, ddown_bias = call.mlp_bwd(
            *(dmlp, y_narrow, w.up, w.down, pre, shape.activation),
            *([True, wants.up, wants.up_bias, wants.down, wants.down_bias], dsum2),
        )
        dsum1, dprojected, dnorm1, dnorm1_bias = norm_bwd(dy, sum1, w.norm1, [mean1, rstd1], seeds[1], shape.dropout1)
        dattended, dout, dout_bias = call.linear_bwd(
            *(dprojected, _tokens(attended, starts), w.out, narrow.new_empty(0), "none"),
            [True, wants.out, wants.out_bias],
        )
        dqkv = call.attention_bwd(
            *(_heads(dattended, dz, shape, starts), q, k, v, attended, stats, None, None, lengths, starts, starts),
            *(seeds[0], *ctx.options, (), False),
        )
        wanted = [True, wants.query, wants.key, wants.value, wants.query_bias, wants.key_bias, wants.value_bias]
        dx, dquery, dkey, dvalue, dquery_bias, dkey_bias, dvalue_bias = call.linears_bwd(
            *([_tokens(t, starts) for t in dqkv[:3]], narrow, [w.query, w.key, w.value], dsum1.dtype, wanted, dsum1),
        )
        grads = Weights(
            *(dquery, dkey, dvalue, dout, dup, ddown),
            *(dquery_bias, dkey_bias, dvalue_bias, dout_bias, dup_bias, ddown_bias),
            *(dnorm1, dnorm1_bias, dnorm2, dnorm2_bias),
        )
        of_weights = (g.to(t.dtype) if want else None for g, t, want in zip(grads, w, wants, strict=True))
        return dx.view(dz.shape), *(None,) * 6, *of_weights


def _heads(t: Tensor, x: Tensor, shape: Shape, starts: Tensor | None) -> Tensor:
    """[tokens, H D] to [tokens, H, D] with starts, else to [B, H, S, D]; x: [B, S, width]."""
    if starts is not None:
        return t.view(len(t), -1, shape.head_dim)
    return t.view(*x.shape[:2], -1, shape.head_dim).transpose(1, 2)


def _tokens(t: Tensor, starts: Tensor | None) -> Tensor:
    """Back again, of what attention made, which lies in memory as [B, S, H, D]."""
    return (t if starts is not None else t.transpose(1, 2)).reshape(-1, t.shape[-1] * t.shape[1])

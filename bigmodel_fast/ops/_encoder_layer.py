"""encoder_layer: an encoder layer with norms behind its sums (Vaswani et al. 2017), all of it one function to autograd.

    y = norm1(x + dropout(attention(x) Wo^T + bo)),    z = norm2(y + dropout(mlp(y)))

_layers.py says what for.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _attention, _dense, _layers


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
    first: bool = False,
) -> Tensor | None:
    """The layer's output, in x's dtype; None if the operators have to be called one by one.

    Args:
        x: [B, S, width], contiguous; or [1, tokens, width] with `starts`, the tokens of sequences one after the other
            (without `first` also [tokens, width]).
        starts: [sequences + 1], int32 or int64, rising from 0 to the number of tokens.
        lengths: [B], int32 or int64: how many keys of each sequence there are.
        first: only the first token of each sequence is asked for.

    Returns:
        As x in shape; with `first` [B, 1, width], or [1, sequences, width].
    """
    dtype = _layers.compute_dtype([x], weights[:_MATRICES], weights[_MATRICES:])
    dimensions = (3,) if starts is None or first else (2, 3)
    if dtype is None or x.dim() not in dimensions or not _fit(x.shape[-1], weights, shape.head_dim):
        return None
    dropouts = shape[-3:]
    name = "encoder_layer" if starts is None else "encoder_layer_varlen"
    if 1.0 in dropouts or not _dispatch.use_native(name, None, x):
        return None
    if starts is not None:
        _attention.check_boundaries(name, "starts", starts, x.shape[:-1].numel())
    if lengths is not None:
        _attention.check_lengths(name, "lengths", lengths, x.shape[0], x.shape[1])
    seeds: list[Tensor | None] = [None, None, None]
    if any(dropouts):
        drawn = torch.randint(1 << 62, (3, 1), dtype=torch.int64).unbind()
        seeds = [seed if p else None for seed, p in zip(drawn, dropouts, strict=True)]
    rows, query_starts = None, starts
    if first and starts is not None:
        rows, query_starts = starts[:-1], torch.arange(len(starts))
    elif first:
        rows = torch.arange(0, x.shape[0] * x.shape[1], x.shape[1])
    keeps = _dense.needs_grad(x, *weights)
    return _EncoderLayer.apply(x, rows, query_starts, starts, lengths, dtype, shape, seeds, keeps, *weights)


def _fit(width: int, w: Weights, head_dim: int) -> bool:
    """Whether sizes go together."""
    all_heads, hidden = len(w.query), len(w.up)
    return all_heads % head_dim == 0 and _layers.fit(
        [
            *((t, (all_heads, width)) for t in (w.query, w.key, w.value)),
            *((t, (all_heads,)) for t in (w.query_bias, w.key_bias, w.value_bias)),
            *((w.out, (width, all_heads)), (w.out_bias, (width,))),
            *((w.up, (hidden, width)), (w.up_bias, (hidden,))),
            *((w.down, (width, hidden)), (w.down_bias, (width,))),
            *((t, (width,)) for t in (w.norm1, w.norm1_bias, w.norm2, w.norm2_bias)),
        ]
    )


class _EncoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor | None,
        query_starts: Tensor | None,
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
        if rows is None:
            asking, qkv = narrow, call.linears_fwd(narrow, [w.query, w.key, w.value], biases)
        else:
            stream, asking = stream.index_select(0, rows), narrow.index_select(0, rows)
            qkv = call.linears_fwd(asking, [w.query], biases[:1])
            qkv += call.linears_fwd(narrow, [w.key, w.value], biases[1:])
        batch = x.shape[0] if starts is None else None
        q, k, v = (_layers.to_heads(t, shape.head_dim, batch) for t in qkv)
        options = (shape.scale, 0.0, _attention.EVERYTHING, _attention.EVERYTHING, shape.attention_dropout)
        tensors = (None, lengths, query_starts, starts, seeds[0])
        attended, stats = call.attention_fwd(q, k, v, None, *tensors, *options)
        sum1, _ = call.linear_fwd(
            _layers.to_tokens(attended), w.out, _dense.wide(w.out_bias), "none", False, stream, seeds[1], shape.dropout1
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
        ctx.shape, ctx.dtype, ctx.options, ctx.x_shape = shape, dtype, options, x.shape
        ctx.dtypes = _layers.dtypes_of(weights)
        ctx.save_for_backward(
            *(narrow, asking, q, k, v, attended, stats, sum1, mean1, rstd1, y_narrow, pre, sum2, mean2, rstd2),
            *(rows, query_starts, starts, lengths, *seeds, *_layers.without_biases(w)),
        )
        return _dense.shaped(z, x.shape if rows is None else (x.shape[0], len(z) // x.shape[0], x.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> Any:
        narrow, asking, q, k, v, attended, stats, sum1, mean1, rstd1, y_narrow, pre, sum2, mean2, rstd2, *rest = (
            ctx.saved_tensors
        )
        rows, query_starts, starts, lengths, *seeds = rest[:7]
        w, call, shape, dtype = Weights(*rest[7:]), torch.ops.bigmodel_fast, ctx.shape, ctx.dtype
        wants = Weights(*ctx.needs_input_grad[-len(w) :])

        dsum2, dmlp, dnorm2, dnorm2_bias = _layers.layer_norm_bwd(
            _dense.rows(dz), None, sum2, w.norm2, mean2, rstd2, dtype, seeds[2], shape.dropout2
        )
        dy, dup, dup_bias, ddown, ddown_bias = call.mlp_bwd(
            *(dmlp, y_narrow, w.up, w.down, pre, shape.activation),
            *([True, wants.up, wants.up_bias, wants.down, wants.down_bias], dsum2),
        )
        dsum1, dprojected, dnorm1, dnorm1_bias = _layers.layer_norm_bwd(
            dy, None, sum1, w.norm1, mean1, rstd1, dtype, seeds[1], shape.dropout1
        )
        dattended, dout, dout_bias = call.linear_bwd(
            *(dprojected, _layers.to_tokens(attended), w.out, narrow.new_empty(0), "none"),
            [True, wants.out, wants.out_bias],
        )
        batch = ctx.x_shape[0] if starts is None else None
        dqkv = call.attention_bwd(
            *(_layers.to_heads(dattended, shape.head_dim, batch), q, k, v, attended, stats, None, None, lengths),
            *(query_starts, starts, seeds[0], *ctx.options, (), False),
        )
        dqkv = [_layers.to_tokens(t) for t in dqkv[:3]]
        wants_x = ctx.needs_input_grad[0]
        wanted = [wants.query, wants.key, wants.value, wants.query_bias, wants.key_bias, wants.value_bias]
        if rows is None:
            dx, dquery, dkey, dvalue, dquery_bias, dkey_bias, dvalue_bias = call.linears_bwd(
                dqkv, narrow, [w.query, w.key, w.value], dsum1.dtype, [wants_x, *wanted], dsum1
            )
        else:
            dx, dkey, dvalue, dkey_bias, dvalue_bias = call.linears_bwd(
                dqkv[1:], narrow, [w.key, w.value], dsum1.dtype, [wants_x, *wanted[1:3], *wanted[4:]]
            )
            dasking, dquery, dquery_bias = call.linears_bwd(
                dqkv[:1], asking, [w.query], dsum1.dtype, [wants_x, wanted[0], wanted[3]], dsum1
            )
            if wants_x:
                dx.index_add_(0, rows, dasking)
        grads = Weights(
            *(dquery, dkey, dvalue, dout, dup, ddown),
            *(dquery_bias, dkey_bias, dvalue_bias, dout_bias, dup_bias, ddown_bias),
            *(dnorm1, dnorm1_bias, dnorm2, dnorm2_bias),
        )
        return dx.view(ctx.x_shape) if wants_x else None, *(None,) * 8, *_layers.of_weights(grads, ctx.dtypes, wants)

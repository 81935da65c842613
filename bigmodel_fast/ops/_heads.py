"""split_heads: queries, keys and values out of one projection, and their gradients back into one without a copy.
project_heads: the same of a projection of several dense layers, whose weights are not put together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _dense
from ._autograd import apply
from .linear import linear

_MOST_LAYERS = 4  # csrc/cpu/linear.h
_FEW = 16  # tokens (of a decoding step): putting the weights into one would take longer than their products


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(qkv, counts):
        return tuple(part.transpose(1, 2) for part in qkv.split(counts, dim=2))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape = inputs[0].shape

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        first = grads[0].transpose(1, 2)
        if _adjacent(grads):
            return first.as_strided(ctx.shape, first.stride()), None
        return torch.cat([g.transpose(1, 2) for g in grads], dim=2), None


def _adjacent(grads: tuple[Tensor, ...]) -> bool:
    """Whether they lie one behind the other, as heads [B, H, S, D] of one tensor; attention makes them so."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    storage, strides = grads[0].untyped_storage().data_ptr(), grads[0].stride()
    start = end = grads[0].storage_offset()
    for g in grads:
        if g.untyped_storage().data_ptr() != storage or g.stride() != strides or g.storage_offset() != end:
            return False
        end += g.shape[1] * strides[1]
    return bool(end - start <= strides[2])


def split_heads(qkv: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """[B, S, sum of counts, D] to one [B, count, S, D] for each count, all of them views."""
    return apply(_SplitHeads, qkv, counts)


@torch.library.register_fake("bigmodel_fast::linears_fwd")
def _(x, weights, biases):
    return [x.new_empty(x.shape[0], len(w)) for w in weights]


@torch.library.register_fake("bigmodel_fast::linears_bwd")
def _(dy, x, weights, dx_dtype, wants, dx_residual=None):
    m, k = x.shape
    lengths = [len(w) if want else 0 for w, want in zip([*weights, *weights], wants[1:], strict=True)]
    dweights = [w.new_empty(n, k) for w, n in zip(weights, lengths, strict=False)]
    dbiases = [x.new_empty(n, dtype=torch.float32) for n in lengths[len(weights) :]]
    return [x.new_empty(m if wants[0] else 0, k, dtype=dx_dtype), *dweights, *dbiases]


class _ProjectHeads(torch.autograd.Function):
    @staticmethod
    def forward(x, narrow, dim, *layers):
        count = len(layers) // 2
        weights, biases = map(_dense.rows, layers[:count]), map(_dense.wide, layers[count:])
        outputs = torch.ops.bigmodel_fast.linears_fwd(_dense.rows(narrow), list(weights), list(biases))
        return tuple(y.view(*x.shape[:2], -1, dim).transpose(1, 2) for y in outputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, narrow, _, *layers = inputs
        count = len(layers) // 2
        ctx.x_dtype, ctx.bias_dtypes = x.dtype, [None if b is None else b.dtype for b in layers[count:]]
        ctx.save_for_backward(narrow, *layers[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        wants = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
        dx, *dlayers = torch.ops.bigmodel_fast.linears_bwd(
            [_dense.rows(g.transpose(1, 2).flatten(2)) for g in grads],
            _dense.rows(x),
            [_dense.rows(w) for w in weights],
            ctx.x_dtype,
            wants,
        )
        dtypes = [*(w.dtype for w in weights), *ctx.bias_dtypes]
        dlayers = (d.to(t) if want else None for d, t, want in zip(dlayers, dtypes, wants[1:], strict=True))
        return dx.view(x.shape) if wants[0] else None, None, None, *dlayers


def project_heads(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], head_dim: int
) -> tuple[Tensor, ...]:
    """What dense layers make of x [B, S, width], as heads [B, their number, S, D] of each layer."""
    narrow, *cast = _dense.operands(x.detach(), *weights)
    alike = len({w.dtype for w in cast}) == 1 and len(cast) in range(2, _MOST_LAYERS + 1)
    reason = _dispatch.unsupported(narrow, *cast, *biases)
    if reason is None and narrow.dtype is torch.float32:
        reason = _dispatch.too_few("linear", narrow, narrow.numel() * sum(len(w) for w in weights))
    if alike and narrow.is_cpu and not torch.compiler.is_compiling() and _dispatch.use_native("linear", reason, narrow):
        return apply(_ProjectHeads, x, narrow, head_dim, *cast, *biases)
    if len(weights) > 1 and x.shape[:2].numel() <= _FEW:
        alone = zip(weights, biases, strict=True)
        return tuple(part for w, b in alone for part in project_heads(x, [w], [b], head_dim))
    weight, bias = weights[0], biases[0]
    if len(weights) > 1:
        weight = torch.cat(list(weights))
        bias = None
        if any(b is not None for b in biases):
            bias = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
    return split_heads(linear(x, weight, bias).view(*x.shape[:2], -1, head_dim), [len(w) // head_dim for w in weights])

"""split_heads: queries, keys and values out of one projection, and their gradients back into one without a copy."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._autograd import apply


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
    if torch.compiler.is_compiling():
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

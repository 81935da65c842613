"""A batch without padding: all its tokens in one row [1, T, W], and the mask that says where sequences begin and end.

Shapes: B sequences, S tokens in the longest, T tokens in all, W width.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops._autograd import apply


class _Take(torch.autograd.Function):
    """Rows of [n, ...], none of them twice."""

    @staticmethod
    def forward(x, rows):
        return x.index_select(0, rows)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, rows = inputs
        ctx.count = x.shape[0]
        ctx.save_for_backward(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return put_rows(grad, ctx.saved_tensors[0], ctx.count), None


def put_rows(x: Tensor, rows: Tensor, count: int) -> Tensor:
    """[count, ...] whose `rows` are those of x, the others 0."""
    return x.new_zeros(count, *x.shape[1:]).index_copy_(0, rows, x)


def make_mask(present: Tensor) -> Tensor:
    """The mask [1, 1, 2, B + 1] of a packed batch, from present [B, S]: boundaries, and S."""
    mask = torch.zeros(1, 1, 2, present.shape[0] + 1, dtype=torch.int64, device=present.device)
    torch.cumsum(present.sum(1), 0, out=mask[0, 0, 0, 1:])
    mask[0, 0, 1] = present.shape[1]
    return mask


def boundaries(mask: Tensor | None) -> Tensor | None:
    """[B + 1], where sequences of a packed batch begin and end; None if this is no packed batch's mask."""
    return mask[0, 0, 0] if mask is not None and mask.dtype is torch.int64 else None


def padded_shape(mask: Tensor) -> tuple[int, int]:
    """(B, S) of a packed batch."""
    return mask.shape[-1] - 1, int(mask[0, 0, 1, 0])


def positions(mask: Tensor) -> Tensor:
    """[T], where packed tokens stand in [B * S]; padding on the right."""
    bounds, length = mask[0, 0, 0], mask[0, 0, 1, 0]
    sequence = torch.repeat_interleave(bounds.diff())
    return torch.arange(len(sequence), device=mask.device) - bounds[sequence] + sequence * length


def first_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """The first token of each sequence: [B, 1, W] of [B, S, W]; [1, B, W] of a packed [1, T, W]."""
    bounds = boundaries(mask)
    return x[:, :1] if bounds is None else apply(_Take, x.squeeze(0), bounds[:-1])[None]


def pack(x: Tensor, mask: Tensor | None) -> Tensor:
    """[B, S, ...] to [1, T, ...], if this is a packed batch's mask; what is packed already stays."""
    if mask is None or boundaries(mask) is None or x.shape[:2] != padded_shape(mask):
        return x
    return apply(_Take, x.flatten(0, 1), positions(mask))[None]


def pad(x: Tensor, mask: Tensor) -> Tensor:
    """A packed [1, T, ...] to [B, S, ...], 0 where padding is."""
    batch, length = padded_shape(mask)
    return put_rows(x.squeeze(0), positions(mask), batch * length).view(batch, length, *x.shape[2:])

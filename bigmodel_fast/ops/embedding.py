"""embedding: out = weight[token], whose gradient is written once instead of zeroed and added to."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _checks, _dense
from ._autograd import apply


def reference(token: Tensor, weight: Tensor) -> Tensor:
    """Plain torch."""
    return F.embedding(token, weight)


def _plain(weight: Tensor, token: Tensor) -> Tensor:
    if token.dtype is not torch.int64 or not weight.is_floating_point():
        raise TypeError("torch takes these too")
    return torch.embedding(weight, token)


@torch.library.register_fake("bigmodel_fast::embedding_fwd")
def _(token, weight):
    return weight.new_empty(token.shape[0], weight.shape[1])


@torch.library.register_fake("bigmodel_fast::embedding_bwd")
def _(grad_out, token, classes, dtype):
    return grad_out.new_empty(classes, grad_out.shape[1], dtype=dtype)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(token, weight):
        out = torch.ops.bigmodel_fast.embedding_fwd(token.reshape(-1), _dense.rows(weight))
        return out if token.dim() == 1 else _dense.shaped(out, (*token.shape, weight.shape[1]))

    @staticmethod
    def setup_context(ctx, inputs, output):
        token, weight = inputs
        ctx.classes, ctx.dtype = weight.shape[0], weight.dtype
        ctx.save_for_backward(token)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        (token,) = ctx.saved_tensors
        grad = torch.ops.bigmodel_fast.embedding_bwd(_dense.rows(grad_out), token.reshape(-1), ctx.classes, ctx.dtype)
        return None, grad


def embedding(token: Tensor, weight: Tensor) -> Tensor:
    """Rows of a table: out[...] = weight[token[...]], as torch.nn.functional.embedding.

    Args:
        token: [...], int64, each in [0, classes).
        weight: [classes, width]; float32, bfloat16, float16 on NVIDIA GPUs, or (by reference) another floating dtype.

    Returns:
        [..., width] in weight's dtype. Gradients of one row are summed in float32. On a GPU, where nothing waits for
        the values of token, one that is out of range gives a row of NaN.

    Raises:
        TypeError: token is not int64, or weight not floating point.
        ValueError: weight is not [classes, width] with a class at least, or the devices differ.
        IndexError: a token is out of range (on CPU, outside of torch.compile).
    """
    op = "embedding"
    if isinstance(token, Tensor) and isinstance(weight, Tensor) and not _dense.needs_grad(weight):
        out = _dispatch.small(op, _plain, token, token.numel(), weight, token)
        if out is not None:
            return out
    _checks.floating(op, weight=weight)
    _checks.ndim(op, "weight", weight, 2, "[classes, width]")
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: weight must have at least one class, got {_checks.describe(weight)}")
    _checks.class_numbers(op, "token", token, weight, weight.shape[0])
    if not _dispatch.use_native(op, _dispatch.unsupported(weight), weight):
        return reference(token, weight)
    return apply(_Embedding, token, weight)

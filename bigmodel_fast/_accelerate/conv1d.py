"""y = x W + b for weights [in, out], as transformers' Conv1D keeps them.

The kernels know such a product as the one that gives the gradient of a dense layer's input. Taken for that, it reads
the weight where it lies: [out, in] would be a copy of it in forward, one in backward, and one of its gradient.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from ..ops import _dense
from ..ops._activation import activate
from ..ops._autograd import apply
from ..ops.dropout import dropout
from ..ops.linear import linear


class _Product(torch.autograd.Function):
    """x [m, in] times weight [in, out]."""

    @staticmethod
    def forward(x, weight):
        shape = x.new_empty(1).expand(x.shape[0], weight.shape[1])  # of the output
        nothing = x.new_empty(0, weight.shape[0])
        return torch.ops.bigmodel_fast.linear_bwd(x, shape, weight, nothing, "none", (True, False, False))[0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy, nothing = dy.contiguous(), x.new_empty(0, weight.shape[0])
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            dx, _ = torch.ops.bigmodel_fast.linear_fwd(dy, weight, None, "none", False)
        if ctx.needs_input_grad[1]:  # x^T dy is what a dense layer of weight [in, out] has for the input dy
            wants = (False, True, False)
            _, dweight, _ = torch.ops.bigmodel_fast.linear_bwd(x, dy, weight, nothing, "none", wants)
        return dx, dweight


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W + b.

    Args:
        x: [..., in]; float32 or bfloat16.
        weight: [in, out]; may be float32 with a bfloat16 x.
        bias: [out] or None.

    Returns:
        [..., out] in x's dtype (autocast's within an autocast region).
    """
    narrow, weight = _dense.operands(x, weight)
    usual = x.is_cpu and weight.is_contiguous() and x.numel() and _dispatch.unsupported(narrow, weight, bias) is None
    if not usual or not _dispatch.use_native("linear", None, x):
        return linear(x, weight.t(), bias)
    y = apply(_Product, _dense.rows(narrow).contiguous(), weight).view(*x.shape[:-1], weight.shape[1])
    return y if bias is None else y + bias.to(y.dtype)


def conv1d_mlp(
    x: Tensor, layers: list, activation: str, inner: float, outer: float, residual: Tensor | None = None
) -> Tensor:
    """dropout(second(dropout(activation(first(x))))) + residual."""
    hidden = activate(conv1d(x, layers[0].weight, layers[0].bias), activation)
    y = conv1d(dropout(hidden, inner) if inner else hidden, layers[1].weight, layers[1].bias)
    return dropout(y, outer, residual=residual) if outer or residual is not None else y

"""linear: y = activation(x W^T + b)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _checks, _dense
from ._activation import activate


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """Plain torch; weights are brought to x's dtype."""
    return activate(F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)), activation)


@torch.library.register_fake("bigmodel_fast::linear_fwd")
def _(x, weight, bias, activation, save_pre):
    m, n = x.shape[0], weight.shape[0]
    return x.new_empty(m, n), x.new_empty(m if save_pre else 0, n)


@torch.library.register_fake("bigmodel_fast::linear_bwd")
def _(dy, x, weight, pre, activation, wants):
    (m, k), n = x.shape, weight.shape[0]
    return (
        x.new_empty(m if wants[0] else 0, k),
        weight.new_empty(n if wants[1] else 0, k),
        x.new_empty(n if wants[2] else 0, dtype=torch.float32),
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x, weight, bias, activation, save_pre):
        y, pre = torch.ops.bigmodel_fast.linear_fwd(
            _dense.rows(x), _dense.rows(weight), _dense.wide(bias), activation, save_pre
        )
        return y.view(*x.shape[:-1], weight.shape[0]), pre

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, ctx.activation, _ = inputs
        _, pre = output
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.mark_non_differentiable(pre)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, pre)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return None, None, None, None, None
        x, weight, pre = ctx.saved_tensors
        wants = ctx.needs_input_grad[:3]
        dx, dweight, dbias = torch.ops.bigmodel_fast.linear_bwd(
            _dense.rows(dy).contiguous(), _dense.rows(x), _dense.rows(weight), pre, ctx.activation, wants
        )
        return (
            dx.view(x.shape) if wants[0] else None,
            dweight if wants[1] else None,
            dbias.to(ctx.bias_dtype) if wants[2] else None,
            None,
            None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """A dense layer with its activation: activation(x W^T + b).

    Args:
        x: [..., in], any strides; float32, bfloat16 or (by reference) another floating dtype.
        weight: [out, in], torch's layout; may be float32 with a bfloat16 x.
        bias: [out] or None.
        activation: "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "relu2" (the square of relu) or None.

    Returns:
        [..., out] in x's dtype (autocast's within an autocast region), summed in float32.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices do not fit together, or the activation is unknown.
    """
    _checks.floating("linear", x=x, weight=weight, **_checks.given(bias=bias))
    _dense.check_input("linear", x)
    _dense.check_weight("linear", "weight", weight, None, x.shape[-1], "(x's last dimension)")
    _checks.shape("linear", "bias", bias, (weight.shape[0],), "(one per row of weight)")
    _checks.choice("linear", "activation", activation, (None, *_checks.ACTIVATIONS))
    x, weight = _dense.operands(x, weight)
    if not _dispatch.use_native("linear", _dispatch.unsupported(x, weight, bias), x):
        return reference(x, weight, bias, activation=activation)
    save_pre = activation is not None and _dense.needs_grad(x, weight, bias)
    return _Linear.apply(x, weight, bias, activation or "none", save_pre)[0]

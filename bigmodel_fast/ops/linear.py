"""linear: y = dropout(activation(x W^T + b)) + residual."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _checks, _dense
from ._activation import activate
from ._autograd import apply


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Plain torch; weights are brought to x's dtype."""
    y = activate(F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)), activation)
    return _dense.finish(y, dropout_p, residual)


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    fits = bias is None or (isinstance(bias, Tensor) and bias.is_cpu and bias.shape == weight.shape[:1])
    if x.dim() == 0 or not (weight.is_cpu and fits):
        raise TypeError("torch takes these too")
    return F.linear(x, weight, bias)


def _small(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x W^T + b by torch, if that is few multiply-adds in float32; else None."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and weight.dim() == 2):
        return None
    if x.dtype is not torch.float32 or _checks.in_cpu_autocast():
        return None
    return _dispatch.small("linear", _plain, x, x.numel() * weight.shape[0], x, weight, bias)


@torch.library.register_fake("bigmodel_fast::linear_fwd")
def _(x, weight, bias, activation, save_pre, residual=None, seed=None, dropout_p=0.0):
    m, n = x.shape[0], weight.shape[0]
    return x.new_empty(m, n, dtype=_dense.finished_dtype(x, residual)), x.new_empty(m if save_pre else 0, n)


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
    def forward(x, weight, bias, residual, seed, activation, save_pre, dropout_p):
        y, pre = torch.ops.bigmodel_fast.linear_fwd(
            _dense.rows(x),
            _dense.rows(weight),
            _dense.wide(bias),
            activation,
            save_pre,
            None if residual is None else _dense.rows(residual),
            seed,
            dropout_p,
        )
        return _dense.shaped(y, (*x.shape[:-1], weight.shape[0])), pre

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, residual, seed, ctx.activation, save_pre, ctx.dropout_p = inputs
        y, pre = output
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.mark_non_differentiable(pre)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, y if ctx.activation == "relu" and not save_pre else pre, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 8
        x, weight, pre, seed = ctx.saved_tensors
        wants = ctx.needs_input_grad[:3]
        grads: tuple[Tensor | None, ...] = (None, None, None)
        if any(wants):  # not the residual alone, for which nothing was saved
            before = _dense.before_finish(dy, seed, ctx.dropout_p, x.dtype)
            grads = torch.ops.bigmodel_fast.linear_bwd(
                before, _dense.rows(x), _dense.rows(weight), _dense.rows(pre), ctx.activation, wants
            )
        dx, dweight, dbias = (grad if want else None for grad, want in zip(grads, wants, strict=True))
        return (
            None if dx is None else dx.view(x.shape),
            dweight,
            None if dbias is None else dbias.to(ctx.bias_dtype),
            dy.to(ctx.residual_dtype) if ctx.needs_input_grad[3] else None,
            *(None,) * 4,
        )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """A dense layer with what follows it: dropout(activation(x W^T + b)) + residual.

    Args:
        x: [..., in], any strides; float32, bfloat16 or (by reference) another floating dtype.
        weight: [out, in], torch's layout; may be float32 with a bfloat16 x.
        bias: [out] or None.
        activation: "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "relu2" (the square of relu) or None.
        dropout_p: probability with which an element is dropped, as by ops.dropout.
        residual: [..., out], added last; its dtype may differ.

    Returns:
        [..., out] in x's dtype (autocast's within an autocast region), or float32 with a float32 residual; summed in
        float32.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices do not fit together, or the activation is unknown.
    """
    return _linear(x, weight, bias, activation, dropout_p, residual, kept=False)


def hidden_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, activation: str | None) -> Tensor:
    """linear for an output that nobody changes in place: with relu, backward reads it and nothing else is saved."""
    return _linear(x, weight, bias, activation, 0.0, None, kept=True)


def _linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    dropout_p: float,
    residual: Tensor | None,
    kept: bool,
) -> Tensor:
    bare = activation is None and dropout_p == 0 and residual is None
    if bare and (y := _small(x, weight, bias)) is not None:
        return y
    _checks.floating("linear", x=x, weight=weight, **_checks.given(bias=bias, residual=residual))
    _dense.check_input("linear", x)
    _dense.check_weight("linear", "weight", weight, None, x.shape[-1], "(x's last dimension)")
    _checks.shape("linear", "bias", bias, (weight.shape[0],), "(one per row of weight)")
    _checks.choice("linear", "activation", activation, (None, *_checks.ACTIVATIONS))
    _dense.check_finish("linear", "dropout_p", dropout_p, residual, (*x.shape[:-1], weight.shape[0]))
    x, weight = _dense.operands(x, weight)
    reason = _dispatch.unsupported(x, weight, bias, residual)
    if reason is None and bare and x.dtype is torch.float32:
        reason = _dispatch.too_few("linear", x, x.numel() * weight.shape[0])
    if not _dispatch.use_native("linear", reason, x):
        return reference(x, weight, bias, activation=activation, dropout_p=dropout_p, residual=residual)
    # The output of relu is positive where its input is, so backward can do without what came before it.
    of_output = kept and activation == "relu" and dropout_p == 0 and residual is None
    save_pre = activation is not None and not of_output and _dense.needs_grad(x, weight, bias)
    seed = _dense.draw_seed(dropout_p, x.device)
    return apply(_Linear, x, weight, bias, residual, seed, activation or "none", save_pre, dropout_p)[0]

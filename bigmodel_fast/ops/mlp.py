"""mlp: y = dropout(activation(x W1^T + b1) W2^T + b2) + residual."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _checks, _cuda, _dense
from ._autograd import apply
from .linear import reference as linear_reference


def reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Plain torch."""
    hidden = linear_reference(x, w1, b1, activation=activation)
    return linear_reference(hidden, w2, b2, dropout_p=dropout_p, residual=residual)


def _fake_forward(x, w1, b1, w2, b2, activation, save_pre, residual=None, seed=None, dropout_p=0.0):
    m = x.shape[0]
    return x.new_empty(m, w2.shape[0], dtype=_dense.finished_dtype(x, residual)), x.new_empty(
        m if save_pre else 0, w1.shape[0]
    )


def _fake_backward(dy, x, w1, w2, pre, activation, wants, dx_residual=None):
    (m, k), f, n = x.shape, w1.shape[0], w2.shape[0]
    return (
        (x if dx_residual is None else dx_residual).new_empty(m if wants[0] else 0, k),
        w1.new_empty(f if wants[1] else 0, k),
        x.new_empty(f if wants[2] else 0, dtype=torch.float32),
        w2.new_empty(n if wants[3] else 0, f),
        x.new_empty(n if wants[4] else 0, dtype=torch.float32),
    )


_cuda.fake("mlp_fwd", _fake_forward)
_cuda.fake("mlp_bwd", _fake_backward)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(x, w1, b1, w2, b2, residual, seed, activation, save_pre, dropout_p):
        y, pre = torch.ops.bigmodel_fast.mlp_fwd(
            _dense.rows(x),
            _dense.rows(w1),
            _dense.wide(b1),
            _dense.rows(w2),
            _dense.wide(b2),
            activation,
            save_pre,
            None if residual is None else _dense.rows(residual),
            seed,
            dropout_p,
        )
        return _dense.shaped(y, (*x.shape[:-1], w2.shape[0])), pre

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w1, b1, w2, b2, residual, seed, ctx.activation, save_pre, ctx.dropout_p = inputs
        _, pre = output
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.bias_dtypes = tuple(None if b is None else b.dtype for b in (b1, b2))
        ctx.mark_non_differentiable(pre)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, w1, w2, b1 if not save_pre else None, pre, seed)
        ctx.saved_pre = save_pre

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 10
        x, w1, w2, b1, pre, seed = ctx.saved_tensors
        if not ctx.saved_pre:
            pre = _dense.before_activation("mlp", x, w1, b1)
        wants = ctx.needs_input_grad[:5]
        grads = torch.ops.bigmodel_fast.mlp_bwd(
            _dense.before_finish(dy, seed, ctx.dropout_p, x.dtype),
            *(_dense.rows(t) for t in (x, w1, w2)),
            pre,
            ctx.activation,
            wants,
        )
        dx, dw1, db1, dw2, db2 = (grad if want else None for grad, want in zip(grads, wants, strict=True))
        b1_dtype, b2_dtype = ctx.bias_dtypes
        return (
            None if dx is None else dx.view(x.shape),
            dw1,
            None if db1 is None else db1.to(b1_dtype),
            dw2,
            None if db2 is None else db2.to(b2_dtype),
            dy.to(ctx.residual_dtype) if ctx.needs_input_grad[5] else None,
            *(None,) * 4,
        )


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu",
    recompute: bool = False,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Two dense layers with an activation between them: dropout(activation(x W1^T + b1) W2^T + b2) + residual.

    Backward keeps x and x W1^T + b1; the hidden activations are made again while the gradient is.

    Args:
        x: [..., in], any strides; float32, bfloat16 or (by reference) another floating dtype.
        w1: [hidden, in]; may be float32 with a bfloat16 x, as may w2.
        b1: [hidden] or None.
        w2: [out, hidden].
        b2: [out] or None.
        activation: "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh" or "relu2" (the square of relu).
        recompute: keep only x; backward makes x W1^T + b1 again, the same bits, for a sixth more time.
        dropout_p: probability with which an element of the output is dropped, as by ops.dropout.
        residual: [..., out], added last; its dtype may differ.

    Returns:
        [..., out] in x's dtype (autocast's within an autocast region), or float32 with a float32 residual; summed in
        float32.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices do not fit together, or the activation is unknown.
    """
    _checks.floating("mlp", x=x, w1=w1, w2=w2, **_checks.given(b1=b1, b2=b2, residual=residual))
    _dense.check_input("mlp", x)
    _dense.check_weight("mlp", "w1", w1, None, x.shape[-1], "(x's last dimension)")
    _checks.shape("mlp", "b1", b1, (w1.shape[0],), "(one per row of w1)")
    _dense.check_weight("mlp", "w2", w2, None, w1.shape[0], "(one column per row of w1)")
    _checks.shape("mlp", "b2", b2, (w2.shape[0],), "(one per row of w2)")
    _checks.choice("mlp", "activation", activation, _checks.ACTIVATIONS)
    _dense.check_finish("mlp", "dropout_p", dropout_p, residual, (*x.shape[:-1], w2.shape[0]))
    x, w1, w2 = _dense.operands(x, w1, w2)
    reason = _dispatch.unsupported(x, w1, b1, w2, b2, residual)
    if reason is None and w1.dtype != w2.dtype:
        reason = "weights of different dtypes"
    reason = reason or _dense.uncovered_on_cuda("mlp", x, residual, dropout_p, w1, w2)
    if not _dispatch.use_native("mlp", reason, x):
        return reference(x, w1, b1, w2, b2, activation=activation, dropout_p=dropout_p, residual=residual)
    save_pre = _dense.needs_grad(x, w1, b1, w2, b2) and not recompute
    seed = _dense.draw_seed(dropout_p, x.device)
    return apply(_Mlp, x, w1, b1, w2, b2, residual, seed, activation, save_pre, dropout_p)[0]

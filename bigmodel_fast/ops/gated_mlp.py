"""gated_mlp: y = dropout((activation(x Wg^T) * (x Wu^T)) Wd^T) + residual (SwiGLU with silu; Shazeer 2020)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _checks, _cuda, _dense
from ._autograd import apply
from .linear import reference as linear_reference


def reference(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str = "silu",
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Plain torch."""
    hidden = linear_reference(x, w_gate, activation=activation) * linear_reference(x, w_up)
    return linear_reference(hidden, w_down, dropout_p=dropout_p, residual=residual)


def _fake_forward(x, w_gate, w_up, w_down, activation, save, residual=None, seed=None, dropout_p=0.0):
    m, f = x.shape[0], w_gate.shape[0]
    saved = m if save else 0
    return (
        x.new_empty(m, w_down.shape[0], dtype=_dense.finished_dtype(x, residual)),
        x.new_empty(saved, f),
        x.new_empty(saved, f),
    )


def _fake_backward(dy, x, w_gate, w_up, w_down, gate, up, activation, wants):
    inputs = (x, w_gate, w_up, w_down)
    return tuple(t.new_empty(t.shape[0] if want else 0, t.shape[1]) for t, want in zip(inputs, wants, strict=True))


_cuda.fake("gated_mlp_fwd", _fake_forward)
_cuda.fake("gated_mlp_bwd", _fake_backward)


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(x, w_gate, w_up, w_down, residual, seed, activation, save, dropout_p):
        y, gate, up = torch.ops.bigmodel_fast.gated_mlp_fwd(
            *(_dense.rows(t) for t in (x, w_gate, w_up, w_down)),
            activation,
            save,
            None if residual is None else _dense.rows(residual),
            seed,
            dropout_p,
        )
        return _dense.shaped(y, (*x.shape[:-1], w_down.shape[0])), gate, up

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, residual, seed, ctx.activation, ctx.saved, ctx.dropout_p = inputs
        _, gate, up = output
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.mark_non_differentiable(gate, up)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, gate, up, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 9
        x, w_gate, w_up, w_down, gate, up, seed = ctx.saved_tensors
        if not ctx.saved:
            gate, up = (_dense.before_activation("gated_mlp", x, w, None) for w in (w_gate, w_up))
        wants = ctx.needs_input_grad[:4]
        grads = torch.ops.bigmodel_fast.gated_mlp_bwd(
            _dense.before_finish(dy, seed, ctx.dropout_p, x.dtype),
            *(_dense.rows(t) for t in (x, w_gate, w_up, w_down)),
            gate,
            up,
            ctx.activation,
            wants,
        )
        dx, *dweights = (grad if want else None for grad, want in zip(grads, wants, strict=True))
        dresidual = dy.to(ctx.residual_dtype) if ctx.needs_input_grad[4] else None
        return None if dx is None else dx.view(x.shape), *dweights, dresidual, *(None,) * 4


def gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str = "silu",
    recompute: bool = False,
    dropout_p: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """A gated MLP without biases: dropout((activation(x Wg^T) * (x Wu^T)) Wd^T) + residual.

    Backward keeps x, x Wg^T and x Wu^T; their product is made again while its gradient is.

    Args:
        x: [..., in], any strides; float32, bfloat16 or (by reference) another floating dtype.
        w_gate: [hidden, in]; may be float32 with a bfloat16 x, as may the other weights.
        w_up: [hidden, in].
        w_down: [out, hidden].
        activation: "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh" or "relu2" (the square of relu).
        recompute: keep only x; backward makes x Wg^T and x Wu^T again, the same bits, for a fifth more time.
        dropout_p: probability with which an element of the output is dropped, as by ops.dropout.
        residual: [..., out], added last; its dtype may differ.

    Returns:
        [..., out] in x's dtype (autocast's within an autocast region), or float32 with a float32 residual; summed in
        float32.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices do not fit together, or the activation is unknown.
    """
    _checks.floating("gated_mlp", x=x, w_gate=w_gate, w_up=w_up, w_down=w_down, **_checks.given(residual=residual))
    _dense.check_input("gated_mlp", x)
    _dense.check_weight("gated_mlp", "w_gate", w_gate, None, x.shape[-1], "(x's last dimension)")
    _dense.check_weight("gated_mlp", "w_up", w_up, w_gate.shape[0], x.shape[-1], "(w_gate's shape)")
    _dense.check_weight("gated_mlp", "w_down", w_down, None, w_gate.shape[0], "(one column per row of w_gate)")
    _checks.choice("gated_mlp", "activation", activation, _checks.ACTIVATIONS)
    _dense.check_finish("gated_mlp", "dropout_p", dropout_p, residual, (*x.shape[:-1], w_down.shape[0]))
    x, w_gate, w_up, w_down = _dense.operands(x, w_gate, w_up, w_down)
    reason = _dispatch.unsupported(x, w_gate, w_up, w_down, residual)
    if reason is None and len({w_gate.dtype, w_up.dtype, w_down.dtype}) > 1:
        reason = "weights of different dtypes"
    reason = reason or _dense.uncovered_on_cuda("gated_mlp", x, residual, dropout_p, w_gate, w_down)
    if not _dispatch.use_native("gated_mlp", reason, x):
        return reference(x, w_gate, w_up, w_down, activation=activation, dropout_p=dropout_p, residual=residual)
    save = _dense.needs_grad(x, w_gate, w_up, w_down) and not recompute
    seed = _dense.draw_seed(dropout_p, x.device)
    return apply(_GatedMlp, x, w_gate, w_up, w_down, residual, seed, activation, save, dropout_p)[0]

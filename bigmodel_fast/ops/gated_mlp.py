"""gated_mlp: y = (activation(x Wg^T) * (x Wu^T)) Wd^T (SwiGLU with silu; Shazeer 2020)."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _checks, _dense
from .linear import reference as linear_reference


def reference(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, activation: str = "silu") -> Tensor:
    """Plain torch."""
    gate = linear_reference(x, w_gate, activation=activation)
    return linear_reference(gate * linear_reference(x, w_up), w_down)


@torch.library.register_fake("bigmodel_fast::gated_mlp_fwd")
def _(x, w_gate, w_up, w_down, activation, save):
    m, f = x.shape[0], w_gate.shape[0]
    saved = m if save else 0
    return x.new_empty(m, w_down.shape[0]), x.new_empty(saved, f), x.new_empty(saved, f)


@torch.library.register_fake("bigmodel_fast::gated_mlp_bwd")
def _(dy, x, w_gate, w_up, w_down, gate, up, activation, wants):
    inputs = (x, w_gate, w_up, w_down)
    return tuple(t.new_empty(t.shape[0] if want else 0, t.shape[1]) for t, want in zip(inputs, wants, strict=True))


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(x, w_gate, w_up, w_down, activation, save):
        y, gate, up = torch.ops.bigmodel_fast.gated_mlp_fwd(
            *(_dense.rows(t) for t in (x, w_gate, w_up, w_down)), activation, save
        )
        return y.view(*x.shape[:-1], w_down.shape[0]), gate, up

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.activation, ctx.saved = inputs
        _, gate, up = output
        ctx.mark_non_differentiable(gate, up)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        if dy is None:
            return (None,) * 6
        x, w_gate, w_up, w_down, gate, up = ctx.saved_tensors
        if not ctx.saved:
            gate, up = (
                torch.ops.bigmodel_fast.linear_fwd(_dense.rows(x), _dense.rows(w), None, "none", False)[0]
                for w in (w_gate, w_up)
            )
        wants = ctx.needs_input_grad[:4]
        grads = torch.ops.bigmodel_fast.gated_mlp_bwd(
            _dense.rows(dy).contiguous(),
            *(_dense.rows(t) for t in (x, w_gate, w_up, w_down)),
            gate,
            up,
            ctx.activation,
            wants,
        )
        dx, *dweights = (grad if want else None for grad, want in zip(grads, wants, strict=True))
        return None if dx is None else dx.view(x.shape), *dweights, None, None


def gated_mlp(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, activation: str = "silu", recompute: bool = False
) -> Tensor:
    """A gated MLP without biases: (activation(x Wg^T) * (x Wu^T)) Wd^T.

    Backward keeps x, x Wg^T and x Wu^T; their product is made again while its gradient is.

    Args:
        x: [..., in], any strides; float32, bfloat16 or (by reference) another floating dtype.
        w_gate: [hidden, in]; may be float32 with a bfloat16 x, as may the other weights.
        w_up: [hidden, in].
        w_down: [out, hidden].
        activation: "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh" or "relu2" (the square of relu).
        recompute: keep only x; backward makes x Wg^T and x Wu^T again, the same bits, for a fifth more time.

    Returns:
        [..., out] in x's dtype (autocast's within an autocast region), summed in float32.

    Raises:
        TypeError: an argument is no floating-point tensor.
        ValueError: shapes or devices do not fit together, or the activation is unknown.
    """
    _checks.floating("gated_mlp", x=x, w_gate=w_gate, w_up=w_up, w_down=w_down)
    _dense.check_input("gated_mlp", x)
    _dense.check_weight("gated_mlp", "w_gate", w_gate, None, x.shape[-1], "(x's last dimension)")
    _dense.check_weight("gated_mlp", "w_up", w_up, w_gate.shape[0], x.shape[-1], "(w_gate's shape)")
    _dense.check_weight("gated_mlp", "w_down", w_down, None, w_gate.shape[0], "(one column per row of w_gate)")
    _checks.choice("gated_mlp", "activation", activation, _checks.ACTIVATIONS)
    x, w_gate, w_up, w_down = _dense.operands(x, w_gate, w_up, w_down)
    reason = _dispatch.unsupported(x, w_gate, w_up, w_down)
    if reason is None and len({w_gate.dtype, w_up.dtype, w_down.dtype}) > 1:
        reason = "weights of different dtypes"
    if not _dispatch.use_native("gated_mlp", reason, x):
        return reference(x, w_gate, w_up, w_down, activation=activation)
    save = _dense.needs_grad(x, w_gate, w_up, w_down) and not recompute
    return _GatedMlp.apply(x, w_gate, w_up, w_down, activation, save)[0]

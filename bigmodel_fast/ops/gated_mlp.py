"""gated_mlp: y = (activation(x Wg^T) * (x Wu^T)) Wd^T (SwiGLU with silu; Shazeer 2020)."""

from torch import Tensor

from . import linear as linear_op


def reference(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, activation: str = "silu") -> Tensor:
    """Plain torch."""
    gate = linear_op.reference(x, w_gate, activation=activation)
    return linear_op.reference(gate * linear_op.reference(x, w_up), w_down)


def gated_mlp(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, *, activation: str = "silu") -> Tensor:
    return reference(x, w_gate, w_up, w_down, activation=activation)

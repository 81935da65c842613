"""gated_mlp on NVIDIA GPUs: y = dropout((act(x Wg^T) (x Wu^T)) Wd^T) + residual.

The products are cuBLAS's; the rest is in `_dense.py`.
"""

import torch
from torch import Tensor

from . import _dense
from .dropout import finish


def gated_mlp_fwd(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    save: bool,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
):
    gate, up = _dense.matmul(x, w_gate), _dense.matmul(x, w_up)
    y = _dense.matmul(_dense.gate(gate, up, activation, keep=save), w_down)
    y = finish(y, residual, seed, dropout_p)
    return (y, gate, up) if save else (y, *(x.new_empty(0, w_gate.shape[0]) for _ in range(2)))


def gated_mlp_bwd(
    dy: Tensor,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    gate: Tensor,
    up: Tensor,
    activation: str,
    wants: list[bool],
):
    want_x, want_gate, want_up, want_down = wants
    dh = _dense.input_gradient(dy, w_down, True)
    dgate, dup, hidden = _dense.gate_backward(dh, gate, up, activation)
    dx = _dense.input_gradient(dgate, w_gate, want_x)
    if want_x:
        dx = torch.addmm(dx, dup, w_up.to(dup.dtype))
    return (
        dx,
        _dense.weight_gradient(dgate, x, w_gate, want_gate),
        _dense.weight_gradient(dup, x, w_up, want_up),
        _dense.weight_gradient(dy, hidden, w_down, want_down),
    )


OPERATORS = {"gated_mlp_fwd": gated_mlp_fwd, "gated_mlp_bwd": gated_mlp_bwd}

"""mlp on NVIDIA GPUs: y = dropout(act(x W1^T + b1) W2^T + b2) + residual. Its parts are in `_dense.py`.

Backward makes the hidden activations again from x W1^T + b1 in the pass that makes their gradient.
"""

from torch import Tensor

from . import _dense
from .dropout import finish


def mlp_fwd(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    activation: str,
    save_pre: bool,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
):
    hidden, pre = _dense.layer(x, w1, b1, activation, keep=save_pre)
    y, _ = _dense.layer(hidden, w2, b2, "none", keep=False)
    return finish(y, residual, seed, dropout_p), pre


def mlp_bwd(dy: Tensor, x: Tensor, w1: Tensor, w2: Tensor, pre: Tensor, activation: str, wants: list[bool]):
    want_x, want_w1, want_b1, want_w2, want_b2 = wants
    dh = _dense.input_gradient(dy, w2, True)
    g, hidden, db1 = _dense.activation_backward(dh, pre, activation, out=dh, want_bias=want_b1, want_hidden=want_w2)
    _, _, db2 = _dense.activation_backward(dy, dy, "none", out=None, want_bias=want_b2, want_hidden=False)
    return (
        _dense.input_gradient(g, w1, want_x),
        _dense.weight_gradient(g, x, w1, want_w1),
        db1,
        _dense.weight_gradient(dy, hidden, w2, want_w2),
        db2,
    )


OPERATORS = {"mlp_fwd": mlp_fwd, "mlp_bwd": mlp_bwd}

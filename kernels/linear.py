"""linear on NVIDIA GPUs: y = dropout(act(x W^T + b)) + residual. Products and what lies between are in `_dense.py`."""

from torch import Tensor

from . import _dense
from .dropout import finish


def linear_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    save_pre: bool,
    residual: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
):
    y, pre = _dense.layer(x, weight, bias, activation, keep=save_pre)
    return finish(y, residual, seed, dropout_p), pre


def linear_bwd(dy: Tensor, x: Tensor, weight: Tensor, pre: Tensor, activation: str, wants: list[bool]):
    g, _, dbias = _dense.activation_backward(dy, pre, activation, out=None, want_bias=wants[2], want_hidden=False)
    return _dense.input_gradient(g, weight, wants[0]), _dense.weight_gradient(g, x, weight, wants[1]), dbias


OPERATORS = {"linear_fwd": linear_fwd, "linear_bwd": linear_bwd}

"""mlp: y = activation(x W1^T + b1) W2^T + b2."""

from torch import Tensor

from . import linear as linear_op


def reference(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu"
) -> Tensor:
    """Plain torch."""
    return linear_op.reference(linear_op.reference(x, w1, b1, activation=activation), w2, b2)


def mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu") -> Tensor:
    return reference(x, w1, b1, w2, b2, activation=activation)

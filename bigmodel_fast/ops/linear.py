"""linear: y = activation(x W^T + b)."""

import torch.nn.functional as F
from torch import Tensor

from ._activation import activate


def reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    """Plain torch; weights are brought to x's dtype."""
    return activate(F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)), activation)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    return reference(x, weight, bias, activation=activation)

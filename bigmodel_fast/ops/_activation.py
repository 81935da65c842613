"""The activation functions operators can fuse, in plain torch."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu2": lambda x: F.relu(x).square(),
}


def activate(x: Tensor, activation: str | None) -> Tensor:
    """activation(x); x itself for None."""
    return x if activation is None else _FUNCTIONS[activation](x)

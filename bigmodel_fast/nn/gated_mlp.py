"""GatedMLP, which torch lacks."""

import torch
from torch import Tensor

from . import parts


class GatedMLP(torch.nn.Module):
    """down(activation(gate(x)) * up(x)), without biases (Shazeer 2020); activation "silu" makes it SwiGLU."""

    def __init__(self, width: int, hidden: int, *, activation: str = "silu"):
        super().__init__()
        self.gate = torch.nn.Linear(width, hidden, bias=False)
        self.up = torch.nn.Linear(width, hidden, bias=False)
        self.down = torch.nn.Linear(hidden, width, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to [..., width]."""
        return parts.gated_mlp(x, self.gate, self.up, self.down, activation=self.activation)

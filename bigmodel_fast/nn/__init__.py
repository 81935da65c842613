"""Modules over the operators, with the constructor arguments and state_dict keys of their torch.nn counterparts."""

from .gated_mlp import GatedMLP
from .modules import LayerNorm, Linear, RMSNorm

__all__ = ["GatedMLP", "LayerNorm", "Linear", "RMSNorm"]

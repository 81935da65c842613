"""Modules over the operators, with the constructor arguments and state_dict keys of their torch.nn counterparts."""

from .modules import GatedMLP, LayerNorm, Linear, RMSNorm

__all__ = ["GatedMLP", "LayerNorm", "Linear", "RMSNorm"]

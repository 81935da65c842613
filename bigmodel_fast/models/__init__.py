"""Models over the operators, each readable on a few screens."""

from .gpt import GPT, GPTConfig
from .mlp import MLP
from .vit import ViT, ViTConfig

__all__ = ["GPT", "MLP", "GPTConfig", "ViT", "ViTConfig"]

"""Models over the operators, each readable on a few screens."""

from .gpt import GPT, GPTConfig
from .mlp import MLP

__all__ = ["GPT", "MLP", "GPTConfig"]

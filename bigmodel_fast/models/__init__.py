"""Models over the operators, each readable on a few screens."""

from .gpt import GPT, GPTConfig

__all__ = ["GPT", "GPTConfig"]

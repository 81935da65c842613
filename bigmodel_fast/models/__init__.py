"""Models over the operators, each readable on a few screens."""

from .beam_search import Translation, translate
from .bert import BERT, BERTConfig
from .gpt import GPT, GPTConfig
from .layers import recompute_layers
from .mlp import MLP
from .transformer import Transformer, TransformerConfig, pack
from .vit import ViT, ViTConfig

__all__ = [
    "BERT",
    "GPT",
    "MLP",
    "BERTConfig",
    "GPTConfig",
    "Transformer",
    "TransformerConfig",
    "Translation",
    "ViT",
    "ViTConfig",
    "pack",
    "recompute_layers",
    "translate",
]

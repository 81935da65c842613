"""The operators. Each file holds one: its equation, its readable reference, and the public function."""

from .. import _library  # noqa: F401  (the native operators: fake kernels below are registered for them)
from . import _heads, _triton  # noqa: F401  (fake kernels of its own; implementations on CUDA)
from .attention import attention
from .attention_varlen import attention_varlen
from .cross_entropy import cross_entropy
from .dropout import dropout
from .embedding import embedding
from .gated_mlp import gated_mlp
from .layer_norm import layer_norm
from .linear import linear
from .linear_cross_entropy import linear_cross_entropy
from .mlp import mlp
from .rms_norm import rms_norm
from .rotary import rotary

__all__ = [
    "attention",
    "attention_varlen",
    "cross_entropy",
    "dropout",
    "embedding",
    "gated_mlp",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "rms_norm",
    "rotary",
]

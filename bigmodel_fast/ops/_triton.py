"""The Triton launchers of `bigmodel_fast.kernels` as the CUDA implementation of the native operators.

What is registered here imports its kernel, and triton with it, at its first call with a CUDA tensor. Where the CUDA C++
kernel is asked for (`_cuda.py`), that runs in its place.
"""

import importlib
from collections.abc import Callable

import torch

from .. import _dispatch
from . import _cuda

# The raw operators of each file in kernels/.
LAUNCHERS = {
    "attention": ("attention_fwd", "attention_bwd"),
    "cross_entropy": ("cross_entropy_fwd", "cross_entropy_bwd"),
    "dropout": ("dropout_fwd",),
    "embedding": ("embedding_fwd", "embedding_bwd"),
    "gated_mlp": ("gated_mlp_fwd", "gated_mlp_bwd"),
    "layer_norm": ("layer_norm_fwd", "layer_norm_bwd"),
    "linear": ("linear_fwd", "linear_bwd"),
    "linear_cross_entropy": ("linear_cross_entropy_fwd", "linear_cross_entropy_bwd"),
    "mlp": ("mlp_fwd", "mlp_bwd"),
    "optim": ("adamw_", "sgd_"),
    "rms_norm": ("rms_norm_fwd", "rms_norm_bwd"),
    "rotary": ("rotary_fwd",),
}
PUBLIC = {*LAUNCHERS, "attention_varlen", "AdamW", "SGD", "clip_grad_norm_"} - {"optim"}

_implementations = torch.library.Library("bigmodel_fast", "IMPL")


def _late(stem: str, name: str) -> Callable:
    def launch(*arguments):
        if _dispatch.cuda_backend(stem) == "native":
            return _cuda.launch(name, *arguments)
        module = importlib.import_module(f"bigmodel_fast.kernels.{stem}")
        return module.OPERATORS[name](*arguments)

    return launch


for _stem, _names in LAUNCHERS.items():
    for _name in _names:
        _implementations.impl(_name, _late(_stem, _name), "CUDA")
_dispatch.have_triton(PUBLIC)

"""Fast attention, MLP, norm and loss operators for PyTorch on CPU and NVIDIA GPUs, and training commands over them."""

__version__ = "0.1.0"

from . import ops
from ._dispatch import explain
from ._library import build_info, cpu_isa, working_memory
from ._packed_weights import packed_weights

__all__ = ["__version__", "build_info", "cpu_isa", "explain", "ops", "packed_weights", "working_memory"]

_SUBMODULES = ("data", "models", "nn", "optim", "train")
_ACCELERATE = ("accelerate", "restore")


def __getattr__(name: str):
    if name in _SUBMODULES:
        import importlib

        return importlib.import_module(f"{__name__}.{name}")
    if name in _ACCELERATE:
        from . import _accelerate

        return getattr(_accelerate, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES, *_ACCELERATE])

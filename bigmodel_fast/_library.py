"""Loads the native libraries: `_C` and, through it, the operators under `torch.ops.bigmodel_fast`."""

import torch  # noqa: F401  (libtorch must be in the process before the operator library is)

try:
    from . import _C
except ImportError as error:
    raise ImportError(
        f"bigmodel_fast's native library did not load ({error}). In a source tree, build it with `make dev` or "
        "`pip install --no-build-isolation -e .`"
    ) from error


def cpu_isa(name: str | None = None) -> str:
    """Instruction set the CPU kernels use: "generic", "avx2", "avx512" or "avx512_bf16".

    Args:
        name: if given, use this one from now on (as the environment variable BMF_CPU_ISA does at start).

    Raises:
        ValueError: this machine does not have `name`; the message lists what it has.
    """
    if name is not None:
        _C.set_cpu_isa(name)
    return _C.cpu_isa()


def supported_cpu_isas() -> list[str]:
    """Instruction sets this build and this machine can use, slowest first."""
    return _C.supported_cpu_isas()


def working_memory() -> dict[str, int]:
    """Bytes of working memory that are `kept` for later calls, and the most that ever are (`limit`)."""
    return {"kept": _C.scratch_kept_bytes(), "limit": _C.scratch_kept_limit}


def build_info() -> dict[str, object]:
    """Compiler, torch version at build time, oldest torch the operators run under, and whether CUDA kernels are in."""
    return dict(_C.build_info)

"""Which path an operator takes, and the record of it that `explain()` shows."""

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.compiler import is_compiling

_BACKENDS = ("native", "triton", "reference")
UNMEASURED = "taken, but never measured on a GPU"  # what is to be known of csrc/cuda
_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
# What an operator has to have, and how many of them: on CPU, plain torch is done with fewer before a kernel of ours is
# called, or before weights are packed for it. Where forward and backward take as long, measured on an AMD EPYC (Zen 4).
FEWEST: dict[str, tuple[int, str]] = {
    "cross_entropy": (1 << 16, "logits"),
    "dropout": (1 << 13, "elements"),
    "embedding": (1 << 13, "tokens, and no gradient"),
    "layer_norm": (1 << 17, "elements"),
    "linear": (1 << 26, "multiply-adds in float32"),
    "linear_cross_entropy": (4, "tokens"),
    "rms_norm": (1 << 15, "elements, and no gradient"),
}
_triton: set[str] = set()  # operators that have a Triton kernel
_native_cuda: set[str] = set()  # operators that have a CUDA C++ kernel in this build
_calls: Counter[tuple[str, str, str]] = Counter()
_small_calls = dict.fromkeys(FEWEST, 0)  # by operator, of `small`: counted in less time


def _forced_backend() -> str | None:
    forced = os.environ.get("BMF_BACKEND") or None
    if forced is not None and forced not in _BACKENDS:
        raise ValueError(f"BMF_BACKEND must be one of {', '.join(_BACKENDS)}, not {forced!r}")
    return forced


_forced = _forced_backend()


def have_triton(ops: Iterable[str]) -> None:
    """These operators have a Triton kernel, if triton is installed."""
    if importlib.util.find_spec("triton") is not None:
        _triton.update(ops)


def have_native_cuda(ops: Iterable[str]) -> None:
    """This build has a CUDA C++ kernel for these operators."""
    _native_cuda.update(ops)


def cuda_backend(op: str) -> str:
    """Whose kernel an operator runs on a GPU: Triton's, unless the CUDA C++ one is forced and there is one."""
    return "native" if _forced == "native" and op in _native_cuda else "triton"


@contextmanager
def forcing(backend: str | None) -> Iterator[None]:
    """As if BMF_BACKEND were `backend`, for whoever compares backends in one process."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


@contextmanager
def unrecorded() -> Iterator[None]:
    """`explain()` will not know of the calls made meanwhile."""
    calls, small_calls = _calls.copy(), _small_calls.copy()
    try:
        yield
    finally:
        _calls.clear()
        _calls.update(calls)
        _small_calls.update(small_calls)


def use_native(op: str, reason: str | None, t: torch.Tensor | None = None) -> bool:
    """True if `op` runs its kernel: the C++ one, or that of `cuda_backend` if `t` lies on a GPU.

    `reason` says why the kernel does not cover this call, or is None.
    """
    backend = cuda_backend(op) if t is not None and t.is_cuda else "native"
    if reason is None and backend == "triton" and op not in _triton:
        reason = "no kernel for device cuda"
    if _forced is not None and _forced != backend:
        reason = f"BMF_BACKEND={_forced}"
    if not is_compiling():
        remark = UNMEASURED if backend == "native" and t is not None and t.is_cuda else ""
        _calls[(op, "reference" if reason else backend, reason or remark)] += 1
    return reason is None


def _few(op: str) -> str:
    least, what = FEWEST[op]
    return f"fewer than {least} {what}"


def too_few(op: str, t: torch.Tensor, count: int) -> str | None:
    """Why plain torch takes a call of `count` of what FEWEST counts, in `t` or beside it; None if a kernel does.

    Never within a torch.compile graph, which is to hold for more sizes than the one it was traced with.
    """
    if is_compiling() or not t.is_cpu or _forced is not None:
        return None
    return _few(op) if count < FEWEST[op][0] else None


def small(
    op: str, function: Callable[..., torch.Tensor], t: torch.Tensor, count: int, *args: Any
) -> torch.Tensor | None:
    """function(*args), torch's own, if `count` is too few of what FEWEST counts; None if not, or if torch refuses them.

    For calls of microseconds, of which checks would be the larger part. They come after this, and say what is wrong
    with arguments that torch did not take.
    """
    if is_compiling() or count >= FEWEST[op][0] or not t.is_cpu or _forced is not None:
        return None
    try:
        result = function(*args)
    except (IndexError, RuntimeError, TypeError, ValueError):
        return None
    _small_calls[op] += 1
    return result


def unsupported(*tensors: torch.Tensor | None) -> str | None:
    """Why no kernel takes these tensors together, by device and dtype; None if one does."""
    for t in tensors:
        if t is None:
            continue
        dtypes = _DTYPES.get("cpu" if t.is_cpu else t.device.type)
        if dtypes is None:
            return f"no kernel for device {t.device.type}"
        if t.dtype not in dtypes:
            return f"no kernel for {t.dtype}"
    return None


@dataclass(frozen=True)
class Call:
    """One row of `explain()`: how often an operator took a path, and why if it was not the kernel.

    Of a CUDA C++ kernel, `reason` says that it has never been measured on a GPU.
    """

    op: str
    path: str
    reason: str
    count: int


@dataclass(frozen=True)
class Explanation:
    """What `explain()` returns; `str()` gives a table."""

    calls: tuple[Call, ...]

    def __str__(self) -> str:
        if not self.calls:
            return "no operator has been called yet"
        rows = [("operator", "path", "calls", "remark")]
        rows += [(c.op, c.path, str(c.count), c.reason) for c in self.calls]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def explain(*, reset: bool = False) -> Explanation:
    """Which path each operator has taken since import (or since the last reset), and why.

    Calls inside a `torch.compile` graph are not recorded.
    """
    found = _calls + Counter({(op, "reference", _few(op)): n for op, n in _small_calls.items()})
    calls = tuple(Call(op, path, reason, n) for (op, path, reason), n in sorted(found.items()))
    if reset:
        _calls.clear()
        _small_calls.update(dict.fromkeys(_small_calls, 0))
    return Explanation(calls)

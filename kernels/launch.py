"""How kernels are launched: what is known of the device, what is chosen for a launch, and the one place that makes it.

Every kernel of this package is started by `run`. Choices (block sizes, warps, pipeline stages) are frozen data that a
function of shapes, dtypes and the device's compute capability picks: no measuring at run time unless it is asked for
(`autotune.py`), no state. A test puts
a recorder in place of `run`, gives the launchers tensors without memory, and so compiles ahead of time what they would
have started.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor


def switch(name: str) -> bool:
    """An environment variable that is 1 (on), or 0, empty or not set (off)."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} must be 0 or 1, not {value!r}")
    return value == "1"


@dataclass(frozen=True)
class Target:
    """What choices depend on."""

    capability: int  # 80: A100, 90: H100 and H200, 100: B200
    processors: int  # streaming multiprocessors

    @property
    def choices(self) -> int:
        """Whose launch choices it takes: 80, 90 or 100; GPUs of little shared memory (86, 89, 120): 80."""
        return {9: 90, 10: 100}.get(self.capability // 10, 80)


A100, H100, B200 = Target(80, 108), Target(90, 132), Target(100, 148)

_assumed: Target | None = None


@contextlib.contextmanager
def assume(target: Target) -> Iterator[None]:
    """Within it, choices are made for `target`, whatever the tensors lie on."""
    global _assumed
    before, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = before


@functools.cache
def _present(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    return Target(10 * properties.major + properties.minor, properties.multi_processor_count)


def target_of(t: Tensor) -> Target:
    """The device of `t`; an H100 for tensors that lie on none (the interpreter's)."""
    if _assumed is not None:
        return _assumed
    return _present(t.device.index) if t.is_cuda else H100


@dataclass(frozen=True)
class Rows:
    """Rows at a time and columns at a time, for kernels that walk over a matrix."""

    rows: int
    columns: int
    warps: int
    stages: int = 1


@dataclass(frozen=True)
class Tiles:
    """A block of queries by a block of keys, for attention.

    precision: of products of float32, as tl.dot takes it: "ieee", or three products of tf32 on the tensor cores, which
    have 21 of float32's 23 bits.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    precision: str = "ieee"


def on_device(device: torch.device) -> contextlib.AbstractContextManager:
    """Within it, `device` is the current one, if it is a GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def run(kernel, grid: tuple[int, ...], arguments: tuple, constants: dict, warps: int, stages: int = 1) -> None:
    """Starts `kernel` on the current stream of its tensors' device; nothing for an empty grid."""
    if 0 in grid:
        return
    with on_device(next(a.device for a in arguments if isinstance(a, Tensor))):
        kernel[grid](*arguments, **constants, num_warps=warps, num_stages=stages)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n (and 1)."""
    return triton.next_power_of_2(max(1, n))


def row_matrix(t: Tensor) -> Tensor:
    """`t` [..., width] as [rows, width] with contiguous rows, without a copy where its strides allow it."""
    t = t.reshape(t.numel() // t.shape[-1] if t.shape[-1] else 0, t.shape[-1])
    return t if t.stride(-1) == 1 or t.shape[-1] < 2 else t.contiguous()


def whole_rows(rows: int, width: int, processors: int, most: int) -> Rows:
    """Rows that fit into registers as a whole, at most `most` elements at a time.

    A thread has 16 elements or so, enough bytes in flight to reach the memory's bandwidth; narrow rows go several at a
    time, as long as that leaves a program for every processor.
    """
    columns = power_of_two(width)
    together = max(1, min(most // columns, power_of_two(rows // (4 * processors))))
    return Rows(together, columns, warps=min(32, max(1, together * columns // 512)))

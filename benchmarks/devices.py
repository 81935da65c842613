"""What the engine needs to know about a device: its clock, its peaks, and the extra memory of a task."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import torch

from bigmodel_fast._machine import cpu_peaks

from .cases import DTYPES, Benchmark, Case
from .memory import peak_of_task

CUDA_COPY_BYTES = 1 << 30  # far more than any cache
CUDA_MATMUL = 8192
CUDA_FLUSH_BYTES = 1 << 28  # more than any L2
CUDA_SLEEP_CYCLES = 2_000_000  # about a millisecond, in which a pass is launched as a whole
CUDA_PEAK_TRIALS = 10  # milliseconds each, of which the best counts; the clock has to rise first


class Device(ABC):
    """A clock and what it is read against."""

    shortest_sample: float  # seconds: what takes less is repeated within a sample

    def __init__(self, device: torch.device):
        self.device = device

    @abstractmethod
    def mark(self) -> Any:
        """A time stamp of now, on the device."""

    @abstractmethod
    def seconds(self, start: Any, end: Any) -> float:
        """Time between two stamps, once both have passed."""

    @abstractmethod
    def clear(self) -> None:
        """Before each run: what a run left in the caches is no advantage of the next."""

    @abstractmethod
    def release(self) -> None:
        """After each case: gives back memory that nothing uses any more."""

    @abstractmethod
    def peaks(self) -> dict[str, float]:
        """Operations per second in "bf16" and "fp32", and bytes per second of a copy as "copy"; measured now."""

    @abstractmethod
    def extra_memory(self, benchmark: Benchmark, case: Case, provider: str, dtype: str, inputs: Any) -> int | None:
        """Most bytes that forward and backward take beside their inputs; None where it cannot be told."""


class Cpu(Device):
    """Wall-clock time. Caches are not flushed: providers take turns, so each finds the other's data there."""

    shortest_sample = 1e-3

    def mark(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def clear(self) -> None:
        pass

    def release(self) -> None:
        pass

    def peaks(self) -> dict[str, float]:
        return cpu_peaks()

    def extra_memory(self, benchmark: Benchmark, case: Case, provider: str, dtype: str, inputs: Any) -> int | None:
        return peak_of_task(benchmark.name, case.name, provider, dtype, torch.get_num_threads())


class Cuda(Device):
    """Events on the stream, behind a pause and a write that evicts the L2 cache.

    While the GPU sleeps, the host launches what is measured, as it does in training, where it runs ahead of the GPU: a
    pass whose launches take less than the pause is measured without them.
    """

    shortest_sample = 0.0  # a repeat would find its data in the L2 cache

    def __init__(self, device: torch.device):
        super().__init__(device)
        self._flush = torch.empty(CUDA_FLUSH_BYTES, dtype=torch.int8, device=device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def clear(self) -> None:
        torch.cuda._sleep(CUDA_SLEEP_CYCLES)
        self._flush.zero_()

    def release(self) -> None:
        torch.cuda.empty_cache()

    def peaks(self) -> dict[str, float]:
        found = {}
        for name, dtype in DTYPES.items():
            a = torch.randn(CUDA_MATMUL, CUDA_MATMUL, device=self.device).to(dtype)
            a @ a
            found[name] = 2.0 * CUDA_MATMUL**3 / min(self._time(a) for _ in range(CUDA_PEAK_TRIALS))
        return {**found, "copy": self._copy_bandwidth()}

    def extra_memory(self, benchmark: Benchmark, case: Case, provider: str, dtype: str, inputs: Any) -> int | None:
        # The allocator counts exactly, so no fresh process is needed. The first run takes what is kept for later ones.
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        task = benchmark.task(provider, case, inputs, dtype)
        task.run(self, 1)
        torch.cuda.reset_peak_memory_stats()
        task.run(self, 1)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def _copy_bandwidth(self) -> float:
        source = torch.ones(CUDA_COPY_BYTES // 4, device=self.device)
        target = torch.zeros_like(source)
        best = float("inf")
        for _ in range(CUDA_PEAK_TRIALS):
            start = self.mark()
            target.copy_(source)
            best = min(best, self.seconds(start, self.mark()))
        return 2.0 * CUDA_COPY_BYTES / best

    def _time(self, a: torch.Tensor) -> float:
        start = self.mark()
        a @ a
        return self.seconds(start, self.mark())


def open_device(name: str) -> Device:
    """ "cpu", "cuda", or "auto" for the better one there is. ValueError if there is none of that name."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return Cuda(torch.device("cuda", torch.cuda.current_device()))
    return Cpu(torch.device("cpu"))

"""What is known of the machine and measured on it: the processor, its peaks, and whether torch.compile can work."""

import importlib.util
import os
import platform
import shutil
import time
from functools import cache
from pathlib import Path

import torch

from . import _library  # noqa: F401  (loads peak_flops)

PEAK_SECONDS = 0.2  # of multiplying, for each dtype
COPY_BYTES = 256 << 20  # read and written by a copy: beyond any cache
COPIES = 5


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_peaks() -> dict[str, float]:
    """What the CPU reaches at most, measured now: operations per second in "fp32" and "bf16", bytes of a "copy"."""
    return {
        "fp32": cpu_flops(bfloat16=False),
        "bf16": cpu_flops(bfloat16=True),
        "copy": cpu_copy_bandwidth(),
    }


def cpu_flops(*, bfloat16: bool) -> float:
    """Operations per second of all threads together in multiply-adds (each is two); the best of PEAK_SECONDS."""
    best, iterations, deadline = 0.0, 1000, time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        operations = torch.ops.bigmodel_fast.peak_flops(bfloat16, iterations)
        seconds = time.perf_counter() - start
        best = max(best, operations / seconds)
        if seconds < PEAK_SECONDS / 10:  # too short to tell the clock's and the threads' share in it
            iterations *= 2
    return best


def cpu_copy_bandwidth() -> float:
    """Bytes per second, read and written, by a copy of memory that no cache holds; the best of COPIES."""
    source = torch.ones(COPY_BYTES // 8)  # a quarter each of float32: source and target are COPY_BYTES together
    target = torch.empty_like(source)
    target.copy_(source)  # touches its pages
    best = 0.0
    for _ in range(COPIES):
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, COPY_BYTES / (time.perf_counter() - start))
    return best


@cache
def cannot_compile(device: str) -> str | None:
    """Why torch.compile cannot work for a type of device; None if it can."""
    if device == "cpu" and shutil.which(os.environ.get("CXX") or "g++") is None:
        return "torch.compile needs a C++ compiler for the CPU, and there is none"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton for CUDA, which is not installed"
    return None

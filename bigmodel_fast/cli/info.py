"""bigmodel-fast info: this machine, this installation, and what they reach."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from .. import __version__, build_info, cpu_isa, working_memory
from .._library import supported_cpu_isas
from .arguments import parse

PEAK_SECONDS = 0.2  # of multiplying, for each dtype
COPY_BYTES = 256 << 20  # beyond any cache


def run(argv: list[str]) -> int:
    """The command; returns its exit code."""
    values = parse(argv, "info", options, "Shows versions, the CPU and the instruction set in use, and measured peaks.")
    found = collect()
    print(json.dumps(found, indent=1) if values["json"] else table(found))
    return 0


def options(json: bool = False) -> None:
    """Options of the command.

    Args:
        json: print JSON instead of lines.
    """


def collect() -> dict[str, Any]:
    """Everything that `info` shows; measuring takes about a second."""
    cuda = torch.cuda.is_available()
    return {
        "bigmodel_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_isa": cpu_isa(),
        "cpu_isas_supported": supported_cpu_isas(),
        "cuda_device": torch.cuda.get_device_name() if cuda else None,
        "build": build_info(),
        "working_memory_limit": working_memory()["limit"],
        "peak_gflops_fp32": peak_gflops(bfloat16=False),
        "peak_gflops_bf16": peak_gflops(bfloat16=True),
        "copy_gbytes_per_second": copy_bandwidth(),
    }


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_gflops(*, bfloat16: bool) -> float:
    """The multiply-add rate of all threads together, in 1e9 operations a second (a multiply-add is two)."""
    best, iterations, deadline = 0.0, 1000, time.perf_counter() + PEAK_SECONDS
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        operations = torch.ops.bigmodel_fast.peak_flops(bfloat16, iterations)
        seconds = time.perf_counter() - start
        best = max(best, operations / seconds / 1e9)
        if seconds < PEAK_SECONDS / 10:  # too short to tell the clock's and the threads' share in it
            iterations *= 2
    return best


def copy_bandwidth() -> float:
    """Bytes read and written by a copy of memory that no cache holds, in 1e9 a second; the best of five."""
    source = torch.ones(COPY_BYTES // 8)  # a quarter each of float32: source and target are COPY_BYTES together
    target = torch.empty_like(source)
    target.copy_(source)  # touches its pages
    best = 0.0
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = max(best, COPY_BYTES / (time.perf_counter() - start) / 1e9)
    return best


def table(found: dict[str, Any]) -> str:
    """The findings as aligned lines."""
    supported = ", ".join(found["cpu_isas_supported"])
    build = found["build"]
    rows = {
        "bigmodel_fast": found["bigmodel_fast"],
        "torch": f"{found['torch']} (built with {build['torch_built_with']}, runs from {build['torch_target']} on)",
        "python": found["python"],
        "system": found["system"],
        "cpu": f"{found['cpu']}, {found['cpus']} CPUs, {found['threads']} threads in use",
        "instruction set": f"{found['cpu_isa']} (of {supported}; BMF_CPU_ISA chooses)",
        "compiler": build["compiler"],
        "working memory": f"at most {found['working_memory_limit'] >> 20} MiB kept between calls",
        "CUDA kernels": "built in" if build["cuda"] else "not built",
        "CUDA device": found["cuda_device"] or "none",
        "peak fp32": f"{found['peak_gflops_fp32']:,.0f} GFLOP/s",
        "peak bf16": f"{found['peak_gflops_bf16']:,.0f} GFLOP/s",
        "memory copy": f"{found['copy_gbytes_per_second']:.1f} GB/s, read and written",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows.items())

"""bigmodel-fast info: this machine, this installation, and what they reach."""

import json
import os
import platform
from typing import Any

import torch

from .. import __version__, build_info, cpu_isa, working_memory
from .._library import supported_cpu_isas
from .._machine import cpu_name, cpu_peaks
from .arguments import parse


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
    cuda, peaks = torch.cuda.is_available(), cpu_peaks()
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
        "peak_gflops_fp32": peaks["fp32"] / 1e9,
        "peak_gflops_bf16": peaks["bf16"] / 1e9,
        "copy_gbytes_per_second": peaks["copy"] / 1e9,
    }


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

"""Compiles what the launchers would start, for a GPU that is not there.

Tensors without memory ("meta" tensors) go through a launcher; a recorder in the place of `launch.run` writes down each
kernel with the types, constants, warps and stages that it would have had. Nothing in a launcher may read a tensor's
values, which such tensors do not have: so this also shows that no launcher waits for the device.
"""

import contextlib
import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import triton
from bigmodel_fast.kernels import autotune, launch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
ALIGNED = [["tt.divisibility", 16]]
TILE = ("ROWS", "COLUMNS", "INNER", "QUERIES", "KEYS", "HEADS", "HALF", "SPLITS", "PRECISION")


@dataclass(frozen=True)
class Choice:
    """What a launch choice is: a kernel's tile, warps and stages; attention has others for float32."""

    kernel: str
    float32: bool
    tile: tuple[tuple[str, object], ...]
    warps: int
    stages: int


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel: what Triton would have specialised it to at its first launch."""

    kernel: str  # module.name
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]  # positions of arguments that are divisible by 16
    warps: int
    stages: int

    def __str__(self) -> str:
        types = "-".join(dict.fromkeys(t for _, t in self.signature if t.startswith("*")))
        named = [f"{k}={v}" for k, v in self.constants if k.isupper()]
        return ":".join([self.kernel, types, *named, f"warps={self.warps}", f"stages={self.stages}"])

    @property
    def choice(self) -> Choice:
        tile = tuple((name, value) for name, value in self.constants if name in TILE)
        return Choice(self.kernel, dict(self.signature).get("query") == "*fp32", tile, self.warps, self.stages)


@dataclass(frozen=True)
class Resources:
    """Of a compiled kernel: registers of a thread, shared memory of a program and spilled bytes of a thread."""

    registers: int
    shared: int
    spilled: int


def specialise(value: object) -> tuple[str, bool]:
    """The type of an argument as Triton names it, and whether it is known to be divisible by 16."""
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}", True
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int):
        if value == 1:
            return "constexpr", False
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    assert isinstance(value, float)
    return "fp32", False


@contextlib.contextmanager
def recorded(target: launch.Target, every_candidate: bool = False) -> Iterator[list[Variant]]:
    """Collects the variants that launchers ask for within it, each once; or all that autotuning would try."""
    variants: dict[Variant, None] = {}

    def record(kernel, grid, arguments, constants, warps, stages=1) -> None:
        if 0 in grid:
            return
        assert all(n < 2**31 for n in grid[:1]), f"{kernel.__name__}: grid {grid}"
        assert all(n < 2**16 for n in grid[1:]), f"{kernel.__name__}: grid {grid}"
        names = kernel.arg_names
        assert len(names) == len(arguments) + len(constants)
        signature, fixed, aligned = [], dict(constants), []
        for i, (name, value) in enumerate(zip(names, arguments, strict=False)):
            kind, by_16 = specialise(value)
            signature.append((name, kind))
            if kind == "constexpr":
                fixed[name] = value
            elif by_16:
                aligned.append(i)
        signature += [(name, "constexpr") for name in constants]
        name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
        key = Variant(name, tuple(signature), tuple(sorted(fixed.items())), tuple(aligned), warps, stages)
        variants[key] = None

    def try_all(kernel, shape_class, candidates, start, t):
        for candidate in candidates:
            start(candidate)
        return candidates[0]

    collected: list[Variant] = []
    with pytest.MonkeyPatch.context() as patch, launch.assume(target):
        patch.setattr(launch, "run", record)
        if every_candidate:
            patch.setattr(autotune, "ENABLED", True)
            patch.setattr(autotune, "pick", try_all)
        yield collected
    collected += variants


def variants_of(call: Callable[[], object], target: launch.Target, every_candidate: bool = False) -> list[Variant]:
    with recorded(target, every_candidate) as variants:
        call()
    return variants


def compile_for(variant: Variant, capability: int) -> Resources:
    """Down to machine code, by the ptxas that Triton brings."""
    module, _, name = variant.kernel.partition(".")
    source = ASTSource(
        getattr(importlib.import_module(f"bigmodel_fast.kernels.{module}"), name),
        dict(variant.signature),
        constexprs=dict(variant.constants),
        attrs={(i,): ALIGNED for i in variant.aligned},
    )
    options = {"num_warps": variant.warps, "num_stages": variant.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run(
            [tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    found = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Resources(found["REG"], compiled.metadata.shared, found["STACK"] + found["LOCAL"])


@contextlib.contextmanager
def compiling(wanted: Iterable[tuple[int, Variant]]) -> Iterator[dict[tuple[int, Variant], Future[Resources]]]:
    """Compiles (capability, variant) side by side, in a process for each processor."""
    workers = len(os.sched_getaffinity(0))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield {(capability, v): pool.submit(_attempt, v, capability) for capability, v in wanted}
        pool.shutdown(cancel_futures=True)


def _attempt(variant: Variant, capability: int) -> Resources:
    """With errors that another process can take."""
    try:
        return compile_for(variant, capability)
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from None

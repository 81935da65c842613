"""The specification that the tests hold (tests/specs), run on a GPU: outputs and gradients of each sample against
float64, with the tolerances of tests/numerics.py; and the same samples as work for compute-sanitizer.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import load, names
from .cases import OURS
from .gpu_checks import Check, Skip
from .memory import NoClock

TESTS = Path(__file__).resolve().parents[1] / "tests"
DTYPES = {  # of activations, and of weights
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp32": (torch.float32, torch.float32),
    "bf16, fp32 weights": (torch.bfloat16, torch.float32),
}
AUTOCAST = {"autocast bf16": torch.bfloat16, "autocast fp16": torch.float16}
TAILS = (1, 17, 65)
SANITIZED = 5  # samples of an operator: its first ones, which are small and have odd sizes and all optional tensors


def tests() -> tuple[Any, Any]:
    """The modules `specs` and `compare` of the tests.

    Raises:
        Skip: they are not here, or need a package that is not.
    """
    if not (TESTS / "specs").is_dir():
        raise Skip(f"needs the source tree: there is no {TESTS / 'specs'}")
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    try:
        return importlib.import_module("specs"), importlib.import_module("compare")
    except ModuleNotFoundError as error:
        raise Skip(f"needs {error.name}: pip install 'bigmodel_fast[dev]'") from None


def numerics(device: torch.device) -> Iterator[Check]:
    """Samples in every dtype and under autocast first; then empty tensors, tails and strides."""
    specs, compare = tests()

    def check(spec: Any, sample: Any, tensors: dict[str, Tensor], layout: Callable, **how: Any) -> None:
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in sample.options.items()}
        compare.assert_matches(spec, dataclasses.replace(sample, options=options), tensors, layout=layout, **how)

    moved = to(device)

    def plain(spec: Any, sample: Any, dtypes: tuple[torch.dtype, torch.dtype], layout: Callable = moved) -> Any:
        return lambda: check(spec, sample, sample.tensors(*dtypes, layout=layout), layout)

    def autocast(spec: Any, sample: Any, dtype: torch.dtype) -> Any:
        return lambda: check(
            spec, sample, sample.tensors(torch.float32, layout=moved), moved, **within(spec, sample, dtype)
        )

    def within(spec: Any, sample: Any, dtype: torch.dtype) -> dict[str, Any]:
        region = torch.autocast(device.type, dtype)
        if spec.autocast == "output":
            return {"context": region, "eager_context": torch.autocast(device.type, dtype)}
        weights = {name for name, arg in sample.args.items() if arg.weight}

        def cast(**arguments: Any) -> Any:
            narrow = {
                name: t.to(dtype)
                if isinstance(t, Tensor) and t.is_floating_point() and name not in weights and name != "alibi_slopes"
                else t
                for name, t in arguments.items()
            }
            return spec.reference(**narrow)

        return {"context": region, "eager": cast if spec.autocast == "cast" else spec.reference}

    cases = specs.cases()
    for kind, dtypes in DTYPES.items():
        for spec, sample in cases:
            if "weights" not in kind or spec.mixed:
                yield f"{spec}, {sample}, {kind}", plain(spec, sample, dtypes)
    for kind, dtype in AUTOCAST.items():
        for spec, sample in cases:
            yield f"{spec}, {sample}, {kind}", autocast(spec, sample, dtype)
    for spec in specs.all_specs():
        for i, sample in enumerate(spec.empty):
            yield f"{spec}, empty {i}: {sample}, bf16", plain(spec, sample, DTYPES["bf16"])
    for spec in specs.all_specs():
        for n in TAILS:
            yield f"{spec}, tail of {n}, bf16", plain(spec, spec.tail(n), DTYPES["bf16"])
    try:
        layouts = importlib.import_module("test_layouts").LAYOUTS
    except ModuleNotFoundError:  # of pytest
        return
    for spec in specs.all_specs():
        for layout in layouts:
            on_device = to(device, layout)
            yield f"{spec}, {layout.__name__}, bf16", plain(spec, spec.samples[1], DTYPES["bf16"], on_device)


def to(device: torch.device, layout: Callable[[Tensor], Tensor] = lambda t: t) -> Callable[[Tensor], Tensor]:
    """A layout of the tests that begins by moving its tensor, so that its strides and offset are made there."""
    return lambda t: layout(t.to(device))


def workloads(device: torch.device) -> Iterator[Check]:
    """Each kernel once on small shapes, forward and backward, compared with nothing: the sanitizer looks on."""
    for name in names():
        benchmark = load(name)
        for dtype in ("bf16", "fp32"):
            if dtype in benchmark.tiny.dtypes:
                yield f"{name}, tiny, {dtype}", partial(once, benchmark, dtype, device)
    try:
        specs, compare = tests()
    except Skip:
        return

    def run(spec: Any, sample: Any) -> None:
        options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in sample.options.items()}
        tensors = sample.tensors(torch.bfloat16, layout=to(device))
        compare.differentiate(spec.op, tensors, options, sample.wanted)

    for i in range(SANITIZED):
        for spec in specs.all_specs():
            if i < len(spec.samples):
                yield f"{spec}, {spec.samples[i]}", partial(run, spec, spec.samples[i])


def once(benchmark: Any, dtype: str, device: torch.device) -> None:
    inputs = benchmark.inputs(benchmark.tiny, dtype, device)
    benchmark.task(OURS, benchmark.tiny, inputs, dtype).run(NoClock(), 1)

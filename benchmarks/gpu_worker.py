"""One job of `gpu.py` in a process of its own: its checks in order, a line of JSON for whatever happens.

    {"plan": [name, ...]}                                what the job will do, once
    {"begin": name}                                      before a check
    {"done": name, "status": "ok", "detail": "", ...}    after it; status is ok, failed or skipped

A process that dies has thus said what it died of. One whose GPU has reported a fault ends itself after the check (every
later call would fail too), and `gpu.py` starts another one behind it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from bigmodel_fast._machine import cannot_compile

from . import engine, load, names
from .cases import Case, is_compiled
from .devices import open_device
from .gpu_checks import Check, Skip, determinism, facts
from .gpu_commands import commands
from .gpu_numerics import numerics, workloads

POISONED = 3  # exit code: the GPU is of no use to this process any more


def prepare(device: torch.device) -> Iterator[Check]:
    """Compiles what the tables will time, so that torch.compile finds it in its cache on the disk; the step first."""
    for name in sorted(names(), key=lambda name: name != "gpt"):
        benchmark = load(name)
        for case in benchmark.cases_on(device.type):
            for dtype in case.dtypes:
                for provider in benchmark.providers(case, dtype, device.type):
                    if is_compiled(provider):
                        call = partial(compile_for_tables, benchmark, provider, case, dtype, device)
                        yield f"{name}: {case.name}, {dtype}, {provider}", call


def compile_for_tables(benchmark: Any, provider: str, case: Case, dtype: str, device: torch.device) -> None:
    if reason := cannot_compile(device.type):
        raise Skip(reason)
    torch._dynamo.reset()
    benchmark.task(provider, case, benchmark.inputs(case, dtype, device), dtype).results()


KINDS = {
    "facts": lambda device: chain(facts(device), commands(device)),
    "numerics": numerics,
    "determinism": determinism,
    "prepare": prepare,
    "sanitize": workloads,
}
BUDGET = engine.Budget(seconds=0.4, least=7, most=20, patience=3.0, warm_ups=3)


def checks_of(job: str, device: torch.device) -> Iterator[Check]:
    """The checks of a job, such as table:attention, or numerics:2/8 for every eighth of them from the third on."""
    kind, _, which = job.partition(":")
    if kind == "table":
        yield from table(which, device.type)
    else:
        part, _, parts = (which or "0/1").partition("/")
        yield from list(KINDS[kind](device))[int(part) :: int(parts)]


def table(name: str, kind: str) -> Iterator[Check]:
    """A check for each case and dtype of a benchmark: its rows, and the peaks that were measured before the first."""
    benchmark, device = load(name), open_device(kind)
    selection = engine.Selection()
    peaks: dict[str, float] = {}

    def measured(case: Any, dtype: str) -> dict[str, Any]:
        nonlocal peaks
        peaks = peaks or device.peaks()
        field = "cuda_cases" if kind == "cuda" else "cases"
        alone = dataclasses.replace(benchmark, **{field: (case,)})  # type: ignore[arg-type]
        chosen = dataclasses.replace(selection, dtypes=(dtype,))
        rows = list(engine.measure(alone, device, chosen, BUDGET))
        return {"rows": [dataclasses.asdict(row) for row in rows], "peaks": peaks}

    for case, dtypes in selection.runs(benchmark, device):
        for dtype in dtypes:
            yield f"{name}: {case.name}, {dtype}", partial(measured, case, dtype)


def work(job: str, path: Path, skip: int, device: torch.device) -> int:
    """Runs the checks of a job, whose names are its own, behind the first `skip`; returns the exit code."""
    with path.open("a") as file:

        def write(**line: Any) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        try:
            checks = list(checks_of(job, device))
        except Skip as reason:
            write(plan=[job])
            write(done=job, status="skipped", detail=str(reason), seconds=0.0)
            return 0
        if skip == 0:
            write(plan=[name for name, _ in checks])
        for name, check in checks[skip:]:
            write(begin=name)
            start, extra, status, detail = time.perf_counter(), {}, "ok", ""
            try:
                found = check()
                if isinstance(found, dict):
                    extra = found
                else:
                    detail = found or ""
                synchronize(device)
            except Skip as reason:
                status, detail = "skipped", str(reason)
            except Exception as error:
                status, detail = "failed", f"{type(error).__name__}: {error}"
            write(done=name, status=status, detail=detail, seconds=time.perf_counter() - start, **extra)
            if status == "failed" and not usable(device):
                return POISONED
    return 0


def synchronize(device: torch.device) -> None:
    """Faults of kernels come to light here."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def usable(device: torch.device) -> bool:
    try:
        synchronize(device)
        return bool((torch.ones(2, device=device) + 1).sum().item() == 4)
    except RuntimeError:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description="One job of gpu.py.")
    parser.add_argument("job")
    parser.add_argument("path", type=Path)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    return work(arguments.job, arguments.path, arguments.skip, torch.device(arguments.device))


if __name__ == "__main__":
    sys.exit(main())

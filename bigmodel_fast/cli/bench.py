"""bigmodel-fast bench: measures the operators beside torch; bench compare: tells whether they became slower; bench
plan: how right predictions are."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from ..benchmarks.cases import Benchmark
    from ..benchmarks.devices import Device
    from ..benchmarks.engine import Budget, Selection
    from ..benchmarks.report import Report

PROG = "bigmodel-fast bench"
TABLE_WIDTH = 200  # columns, where the output is no terminal


class _BadInput(Exception):
    """What the user asked for cannot be done; the message is one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise _BadInput(message)


def run(argv: list[str]) -> int:
    """The command. Returns 0; 1 if bigmodel_fast was wrong, failed or became slower; 2 for bad input."""
    try:
        kind = {"compare": _compare, "plan": _plan}.get(argv[0] if argv else "")
        return _bench(argv) if kind is None else kind(argv[1:])
    except _BadInput as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return 2


def _bench(argv: list[str]) -> int:
    arguments = _bench_arguments(argv)
    _need_extras()
    import torch
    from rich.console import Console

    from .. import benchmarks
    from .._machine import cannot_compile
    from ..benchmarks import cases, devices, engine, report

    chosen = [benchmarks.load(name) for name in _known("benchmark", arguments.ops, benchmarks.names())]
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    try:
        device = devices.open_device(arguments.device)
    except ValueError as error:
        raise _BadInput(str(error)) from None
    selection = _selection(arguments, chosen, device)
    runs = [(benchmark, case, dtypes) for benchmark in chosen for case, dtypes in selection.runs(benchmark, device)]
    if not runs:
        raise _BadInput("no case fits what was asked for; --list shows what there is")
    if arguments.list:
        for benchmark, case, dtypes in runs:
            names = dict.fromkeys(p for d in dtypes for p in selection.providers_of(benchmark, case, d, device))
            print(f"{benchmark.name}: {case.name} ({', '.join(dtypes)}; {', '.join(names)})")
        return 0
    if arguments.out is not None:
        _make_folder(arguments.out)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else TABLE_WIDTH)
    command = shlex.join(["bigmodel-fast", "bench", *argv])
    if reason := cannot_compile(device.device.type):
        console.print(reason, soft_wrap=True)
    total = sum(len(dtypes) for _, _, dtypes in runs)
    budget = engine.QUICK if arguments.quick else engine.FULL
    found = report.Report(report.machine(device.device, command), peaks={}, rows=[])
    try:
        _measure(found, chosen, device, selection, budget, total)
    finally:  # Ctrl-C ends the measuring; what it has found is shown and kept
        if found.rows:
            found.print(console)
            if arguments.out is not None:
                found.save(arguments.out)
                console.print(f"written to {arguments.out}/", soft_wrap=True)
    return 1 if any(row.provider == cases.OURS for row in report.failures(found.rows)) else 0


def _bench_arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        PROG,
        description="Measures operators of bigmodel_fast beside plain torch: the same inputs through each, in turns, "
        "after a check against float64.",
        epilog=f"`{PROG} compare A.json B.json` tells whether they became slower from one run to another; "
        f"`{PROG} plan` how right the predictions of `bigmodel-fast plan` are.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("ops", nargs="*", metavar="OP", help="what to measure (default: everything; --list shows what there is)")
    add("--dtype", type=_names, metavar="NAMES", help="bf16 (autocast with float32 weights), fp32, or both by comma")
    add(
        "--providers", type=_names, metavar="NAMES", help="such as bigmodel_fast,eager,compile (default: all there are)"
    )
    add("--directions", type=_names, metavar="NAMES", help="of forward, backward, both, step (default: all)")
    add("--filter", metavar="TEXT", help="only cases whose name contains it")
    add("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU where there is one")
    add("--quick", action="store_true", help="a few cases, a few runs each; torch.compile only if named in --providers")
    add("--no-memory", action="store_true", help="leave out the peak memory, which needs a process per provider")
    add("--list", action="store_true", help="show the cases and their providers, and run nothing")
    add("--out", type=Path, metavar="FOLDER", help="write bench.json, bench.csv, bench.md and charts there")
    return parser.parse_args(argv)


def _selection(arguments: argparse.Namespace, chosen: list[Benchmark], device: Device) -> Selection:
    from ..benchmarks import cases, engine

    providers = (p for b in chosen for p in b.providers_on(device.device.type))

    def check(option: str, names: list[str] | None, known: Iterable[str]) -> list[str] | None:
        return None if names is None else _known(option, names, list(dict.fromkeys(known)))

    return engine.Selection(
        dtypes=check("--dtype", arguments.dtype, cases.DTYPES) or tuple(cases.DTYPES),
        providers=check("--providers", arguments.providers, providers),
        directions=check("--directions", arguments.directions, (d for b in chosen for d in b.directions)),
        pattern=arguments.filter,
        quick=arguments.quick,
        memory=not arguments.no_memory,
    )


def _measure(
    found: Report, chosen: list[Benchmark], device: Device, selection: Selection, budget: Budget, total: int
) -> None:
    """Fills a report, under a progress bar."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..benchmarks import engine

    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # On stderr, so that a table sent to a file is nothing but the table. Drawn between cases only: a thread that
    # redraws would take time from what is measured.
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=total)
        done = 0

        def show(what: str) -> None:
            nonlocal done
            bar.update(task, completed=done, description=what, refresh=True)
            done += 1

        try:
            for benchmark in chosen:
                found.peaks = engine.best_peaks(found.peaks, device)
                for row in engine.measure(benchmark, device, selection, budget, show):
                    found.rows.append(row)
        finally:
            engine.fill_shares(found.rows, found.peaks)


def _compare(argv: list[str]) -> int:
    parser = _Parser(
        f"{PROG} compare",
        description="Compares two bench.json. What counts is bigmodel_fast's speed-up over torch eager in the same "
        "run, so that a slower machine is no regression. Exits 1 if there is one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("before", type=Path, metavar="A.json")
    parser.add_argument("after", type=Path, metavar="B.json")
    parser.add_argument("--fail-over", default="5%", metavar="SHARE", help="how much slower is a regression")
    arguments = parser.parse_args(argv)
    _need_extras()
    from rich.console import Console

    from ..benchmarks import regressions, report

    try:
        over = regressions.parse_share(arguments.fail_over)
    except ValueError as error:
        raise _BadInput(f"argument --fail-over: {error}") from None
    try:
        before, after = report.Report.load(arguments.before), report.Report.load(arguments.after)
    except ValueError as error:
        raise _BadInput(str(error)) from None
    found = regressions.changes(before.rows, after.rows)
    if not found:
        raise _BadInput(f"{arguments.before} and {arguments.after} have no case of bigmodel_fast in common")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else TABLE_WIDTH)
    console.print(regressions.table(found, over))
    worse = sum(change.fails(over) for change in found)
    console.print(
        f"{worse} of {len(found)} are slower beside eager by more than {over:.1%}" if worse else "no regression"
    )
    return 1 if worse else 0


def _plan(argv: list[str]) -> int:
    parser = _Parser(
        f"{PROG} plan",
        description="Predicts memory and time of twelve training steps on this CPU as `bigmodel-fast plan` does, and "
        "measures them, in about two minutes. Exits 1 if memory is off by more than 15%, or time by more than 25%.",
    )
    parser.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: torch's)")
    arguments = parser.parse_args(argv)
    _need_extras()
    import torch
    from rich.console import Console

    from ..benchmarks import prediction

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    found = list(prediction.predictions())
    Console(highlight=False, width=None if sys.stdout.isatty() else TABLE_WIDTH).print(prediction.table(found))
    return 0 if all(p.holds for p in found) else 1


def _need_extras() -> None:
    try:
        import matplotlib  # noqa: F401
        import rich  # noqa: F401
    except ImportError as error:
        raise _BadInput(f"needs {error.name}: pip install 'bigmodel_fast[bench]'") from None


def _known(what: str, names: Sequence[str], known: Sequence[str]) -> list[str]:
    """`names` without repetition, or all that are known if there are none."""
    for name in names:
        if name not in known:
            raise _BadInput(f"{what}: there is no {name!r}, but {', '.join(known)}")
    return list(dict.fromkeys(names)) or list(known)


def _names(text: str) -> list[str]:
    """Names separated by commas."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise argparse.ArgumentTypeError("must name something")
    return names


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, not {text!r}")
    return int(text)


def _make_folder(folder: Path) -> None:
    """Before the measuring, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _BadInput(f"argument --out: {folder}: {error.strerror}") from None

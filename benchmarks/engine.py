"""Measures a benchmark: checks every provider against float64, then times them in turns.

What is wrong is not timed. Providers take turns run by run, in an order that rotates, so that a machine which slows
down slows all of them; medians and quartiles of the same rounds are compared.
"""

from __future__ import annotations

import gc
import math
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from bigmodel_fast._machine import cannot_compile

from .cases import DTYPES, EAGER, Benchmark, Case, Results, Task, is_compiled
from .devices import Device

# A provider is taken to be wrong, rather than imprecise, from this error on; precision is what the tests are about.
WRONG_FACTOR, WRONG_ULPS = 10.0, 8.0  # so many times eager's error, plus so many units in the last place
WRONG_ALONE = 0.3  # but never more than this share of the largest exact value; torch's own bf16 layer_norm reaches 0.11

MOST_REPEATS = 50  # each repeat of a forward holds its graph until its backward
STABLE = 1.1  # warm-up ends when a run is no faster than the one before by more than this

T = TypeVar("T")


@dataclass(frozen=True)
class Budget:
    """How long a case may take: rounds go on for `seconds`, but there are at least and at most so many."""

    seconds: float = 1.0
    least: int = 5
    most: int = 40
    patience: float = 12.0  # seconds after which MIN_ROUNDS are enough
    warm_ups: int = 5


MIN_ROUNDS = 3
FULL = Budget()
QUICK = Budget(seconds=0.4, least=5, most=15, patience=3.0, warm_ups=3)


@dataclass
class Row:
    """One line of the result: a provider on a case, in one dtype and direction."""

    op: str
    case: str
    dtype: str
    direction: str
    provider: str
    status: str = "ok"  # or "wrong: ..." or "failed: ...", and then nothing below but the error may be there
    seconds: float | None = None  # median
    low: float | None = None  # quartiles
    high: float | None = None
    samples: int = 0
    rate: float | None = None  # of `unit` per second
    unit: str = ""
    share: float | None = None  # of the peak measured in the same run; see `fill_shares`
    speedup: float | None = None  # over torch eager
    error: float | None = None  # against float64, as a share of the largest exact value
    extra_bytes: int | None = None


@dataclass(frozen=True)
class Selection:
    """What to run of a benchmark; None means everything there is."""

    dtypes: Sequence[str] = tuple(DTYPES)
    providers: Sequence[str] | None = None
    directions: Sequence[str] | None = None
    pattern: str | None = None  # a part of the case's name
    quick: bool = False
    memory: bool = True

    def providers_of(self, benchmark: Benchmark, case: Case, dtype: str, device: Device) -> list[str]:
        """The providers of a case, eager first; torch.compile is not quick, so `quick` takes it only if named."""
        found, kind = [], device.device.type
        for name in benchmark.providers(case, dtype, kind):
            asked = name in self.providers if self.providers is not None else not (self.quick and is_compiled(name))
            if asked and (not is_compiled(name) or cannot_compile(kind) is None):
                found.append(name)
        return sorted(found, key=lambda name: name != EAGER)

    def runs(self, benchmark: Benchmark, device: Device) -> Iterator[tuple[Case, list[str]]]:
        """Each case asked for, with the dtypes it is run in."""
        for case in benchmark.cases_on(device.device.type):
            if (self.quick and not case.quick) or (self.pattern or "") not in case.name:
                continue
            if dtypes := [d for d in self.dtypes if d in case.dtypes]:
                yield case, dtypes


@dataclass
class _Entry:
    """A provider while a case is run."""

    name: str
    task: Task | None = None
    status: str = "ok"
    errors: dict[str, float] = field(default_factory=dict)  # by direction
    extra: int | None = None
    samples: list[dict[str, float]] = field(default_factory=list)  # seconds by direction


def rotation(items: Sequence[T], rounds: int) -> Iterator[T]:
    """Every item once a round, each round beginning with the next one: A B C, B C A, C A B, ..."""
    for i in range(rounds):
        for j in range(len(items)):
            yield items[(i + j) % len(items)]


def measure(
    benchmark: Benchmark,
    device: Device,
    selection: Selection,
    budget: Budget,
    progress: Callable[[str], None] = lambda what: None,
) -> Iterator[Row]:
    """All rows of a benchmark, case by case. `progress` is told what is being run, once for each case and dtype."""
    if benchmark.missing is not None:
        progress(f"{benchmark.name}: skipped, {benchmark.missing}")
        return
    for case, dtypes in selection.runs(benchmark, device):
        exact: Results | None = None
        for dtype in dtypes:
            progress(f"{benchmark.name}: {case.name}, {dtype}")
            entries = [_Entry(name) for name in selection.providers_of(benchmark, case, dtype, device)]
            inputs, work = None, {}
            try:
                inputs = benchmark.inputs(case, dtype, device.device)
                exact = benchmark.exact(case, inputs) if exact is None else exact
                work = benchmark.work(case, inputs)
            except Exception as error:  # such as too little memory: nothing is timed that was not checked
                for entry in entries:
                    entry.status = f"failed: no exact result ({_first_line(error)})"
            else:
                with _quiet():
                    _run_case(benchmark, case, dtype, inputs, exact, entries, device, selection, budget)
            yield from _rows(benchmark, case, dtype, work, entries, selection)
            compiled = any(is_compiled(entry.name) for entry in entries)
            del inputs, entries
            gc.collect()
            if compiled:  # the number of graphs that a function may have is limited
                torch._dynamo.reset()
            device.release()


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _run_case(
    benchmark: Benchmark,
    case: Case,
    dtype: str,
    inputs: Any,
    exact: Results,
    entries: list[_Entry],
    device: Device,
    selection: Selection,
    budget: Budget,
) -> None:
    eager: dict[str, float] | None = None
    for entry in entries:
        try:
            entry.task = benchmark.task(entry.name, case, inputs, dtype)
            found = errors(entry.task.results(), exact)
        except Exception as error:  # whatever a provider raises is a result, and the others go on
            entry.task, entry.status = None, f"failed: {_first_line(error)}"
            continue
        entry.errors = by_direction(found)
        entry.status = verdict(found, eager, dtype)
        if entry.name == EAGER and entry.status == "ok":
            eager = found
        if entry.status != "ok":
            entry.task = None
    for entry in entries:
        if selection.memory and entry.status == "ok":
            try:
                entry.extra = device.extra_memory(benchmark, case, entry.name, dtype, inputs)
            except Exception as error:
                entry.task, entry.status = None, f"failed: {_first_line(error)}"
    timed = [entry for entry in entries if entry.status == "ok"]
    time_in_turns([(entry.task, entry.samples) for entry in timed if entry.task is not None], device, budget)


def errors(found: Results, exact: Results) -> dict[str, float]:
    """Of each result: max |found - exact| as a share of max |exact|; infinite for what is missing or not finite."""
    made = {}
    for name, expected in exact.items():
        actual = found.get(name)
        if actual is None or actual.shape != expected.shape:
            made[name] = math.inf
            continue
        difference = (actual.double() - expected).abs().nan_to_num(nan=math.inf)
        scale = expected.abs().max().item() if expected.numel() else 0.0
        made[name] = difference.max().item() / (scale or 1.0) if difference.numel() else 0.0
    return made


def by_direction(found: dict[str, float]) -> dict[str, float]:
    """The largest error of the outputs is forward's, of the gradients backward's, of all that of the whole."""
    forward = max((e for name, e in found.items() if not name.startswith("grad ")), default=0.0)
    backward = max((e for name, e in found.items() if name.startswith("grad ")), default=0.0)
    whole = max(forward, backward)
    return {"forward": forward, "backward": backward, "both": whole, "step": whole}


def verdict(found: dict[str, float], eager: dict[str, float] | None, dtype: str) -> str:
    """ "ok", or which result is wrong and by how much."""
    for name, error in found.items():
        limit = WRONG_ALONE
        if eager is not None:
            limit = min(limit, WRONG_FACTOR * eager[name] + WRONG_ULPS * torch.finfo(DTYPES[dtype]).eps)
        if not error <= limit:
            return f"wrong: {name} is off by {error:.1e} of its largest value, {limit:.1e} is accepted"
    return "ok"


def time_in_turns(tasks: list[tuple[Task, list[dict[str, float]]]], device: Device, budget: Budget) -> None:
    """Warms every task up, then runs them in turns; the seconds of each run are appended to the task's list."""
    if not tasks:
        return
    repeats, round_seconds = [], 0.0
    for task, _ in tasks:
        once = _warm_up(task, device, budget)
        repeats.append(min(MOST_REPEATS, max(1, math.ceil(device.shortest_sample / max(once, 1e-9)))))
        round_seconds += once * repeats[-1]
    rounds = min(budget.most, max(budget.least, math.ceil(budget.seconds / round_seconds)))
    if rounds * round_seconds > budget.patience:
        rounds = max(MIN_ROUNDS, math.floor(budget.patience / round_seconds))
    for i in rotation(range(len(tasks)), rounds):
        task, samples = tasks[i]
        samples.append(_sample(task, device, repeats[i]))


def _sample(task: Task, device: Device, repeats: int) -> dict[str, float]:
    device.clear()
    stamps = task.run(device, repeats)
    return {direction: device.seconds(*pair) / repeats for direction, pair in stamps.items()}


def _warm_up(task: Task, device: Device, budget: Budget) -> float:
    """Runs until a run is hardly faster than the one before; seconds of the fastest."""
    best = math.inf
    for _ in range(budget.warm_ups):
        seconds = max(_sample(task, device, 1).values())
        settled = seconds * STABLE > best or seconds > budget.seconds
        best = min(best, seconds)
        if settled:
            break
    return best


def _rows(
    benchmark: Benchmark,
    case: Case,
    dtype: str,
    work: dict[str, float],
    entries: list[_Entry],
    selection: Selection,
) -> Iterator[Row]:
    for direction in benchmark.directions:
        if selection.directions is not None and direction not in selection.directions:
            continue
        eager: float | None = None
        for entry in entries:
            row = Row(benchmark.name, case.name, dtype, direction, entry.name, entry.status, unit=benchmark.unit)
            row.error = entry.errors.get(direction)
            times = [sample[direction] for sample in entry.samples]
            if times:
                row.low, row.seconds, row.high = quartiles(times)
                row.samples, row.extra_bytes = len(times), entry.extra
                row.rate = work[direction] / row.seconds
                eager = row.seconds if entry.name == EAGER else eager
                row.speedup = None if eager is None else eager / row.seconds
            yield row


def best_peaks(known: dict[str, float], device: Device) -> dict[str, float]:
    """The peaks measured now, or those known where they are higher: a peak is what nothing disturbed."""
    return {name: max(peak, known.get(name, 0.0)) for name, peak in device.peaks().items()}


def fill_shares(rows: list[Row], peaks: dict[str, float]) -> None:
    """Says of each rate what share of the machine's peak it is."""
    for row in rows:
        if row.rate is not None:
            row.share = row.rate / peaks[row.dtype if row.unit == "FLOP" else "copy"]


def quartiles(times: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return low, median, high


def geometric_means(rows: list[Row]) -> dict[tuple[str, str, str], tuple[float, int]]:
    """Mean speed-up over eager by (dtype, direction, provider), and over how many cases."""
    logs: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        if row.speedup is not None and row.provider != EAGER:
            logs.setdefault((row.dtype, row.direction, row.provider), []).append(math.log(row.speedup))
    return {key: (math.exp(statistics.fmean(found)), len(found)) for key, found in logs.items()}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the hints that torch gives about slow paths: a benchmark is about to measure those."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

"""Everything there is to find out about this package on a GPU, by one command and within a few minutes.

    python -m bigmodel_fast.benchmarks.gpu            (or python benchmarks/gpu.py) writes docs/gpu/results.{md,json}
    python -m bigmodel_fast.benchmarks.gpu --budget 4 --only facts,numerics,table:attention --out /tmp/gpu

First what can go on side by side, for half of the time at most: the whole specification against float64 (`numerics`),
what is claimed beyond it (`facts`), the same bits each time (`determinism`), what torch.compile has to have ready
(`prepare`), and compute-sanitizer. Then the tables, one after the other on a quiet GPU, the training step first. What
is left of the time goes to what was cut off. Every job is a process of its own (`gpu_worker.py`): a check that crashes
or hangs is recorded as that, and the job goes on behind it. Results are written whenever a job ends and every few
seconds, so a run that is cut off has lost nothing.

Exit code: 0; 1 if anything of ours failed; 2 without a GPU.
"""

from __future__ import annotations

import sys

if __name__ == "__main__" and not __package__:  # as a file: its folder must not stand for top-level modules
    import runpy

    sys.path[0] = ""
    runpy.run_module("bigmodel_fast.benchmarks.gpu", run_name="__main__")  # which ends the process

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import engine, names
from .gpu_report import Findings, Outcome
from .report import machine

MINUTES = 9.0
SHARE = 0.5  # of the time, at most, before the tables
SHARDS = {"facts": 4, "numerics": 8, "prepare": 1, "determinism": 2}  # processes: most of the time goes to compilers
FIRST_TABLES = ("gpt", "attention", "accelerate", "linear_cross_entropy", "adamw", "rms_norm", "mlp", "gated_mlp",
                "mlp_fused", "linear", "attention_varlen")  # fmt: skip
TABLE_LIMITS = {"gpt": 150.0, "attention": 90.0, "accelerate": 60.0}  # seconds of a table, as long as others wait
TABLE_LIMIT = 45.0
STALL, LONG_STALL = 90.0, 200.0  # seconds without a sign of life, after which a check hangs; of a table or sanitizer
CRASHES = 6  # of a job, after which it is given up
COMPILE_THREADS = "4"  # of torch.compile in each process
GRACE = 3.0  # seconds that a process gets to end
PAUSE, EVERY = 0.1, 10.0  # seconds between two looks at the processes, and between two writings of the results
SANITIZERS = ("memcheck", "racecheck", "synccheck")
CUDA_HOMES = ("CUDA_HOME", "CUDA_PATH")


@dataclass
class Job:
    """A process, started again behind the check that has ended it; `record` is what all of them have written."""

    name: str
    folder: Path
    device: str = "cuda"
    limit: float = float("inf")  # seconds in all
    wrapped: tuple[str, ...] = ()  # compute-sanitizer and its options
    stall: float = STALL
    process: subprocess.Popen | None = None
    ended: bool = False
    why: str = "the time was up"  # of what never ran
    crashes: int = 0
    limited: bool = False  # whether it was its limit that ended it
    spent: float = 0.0
    started: float = 0.0
    alive: float = 0.0  # when there last was a sign of life
    size: int = 0
    fates: dict[str, tuple[str, str]] = field(default_factory=dict)  # of checks that did not end: status and why

    @property
    def section(self) -> str:
        return "sanitizer" if self.wrapped else self.name.partition(":")[0]

    @property
    def record(self) -> Path:
        return self.folder / f"{self.name.replace(':', '-').replace('/', '-of-')}.jsonl"

    @property
    def log(self) -> Path:
        return self.record.with_suffix(".log")

    def lines(self) -> list[dict[str, Any]]:
        """What the worker has written; a last line that is cut short is left out."""
        found = []
        for line in self.record.read_text(encoding="utf-8").splitlines() if self.record.exists() else ():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def command(self, skip: int) -> list[str]:
        """Of the worker; skip: checks that are done with."""
        worker = [sys.executable, "-m", "bigmodel_fast.benchmarks.gpu_worker"]
        name = "sanitize" if self.wrapped else self.name
        return [*self.wrapped, *worker, name, str(self.record), "--skip", str(skip), "--device", self.device]

    def start(self) -> None:
        done = {line["done"] for line in self.lines() if "done" in line}
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": COMPILE_THREADS, **os.environ}
        if self.wrapped:
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # each tensor its own memory, whose ends are watched
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self.command(len(done | self.fates.keys())),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self.started = self.alive = time.monotonic()

    def poll(self) -> bool:
        """Whether the process has ended, by itself or because it took too long."""
        assert self.process is not None
        now = time.monotonic()
        size = sum(path.stat().st_size for path in (self.record, self.log) if path.exists())
        if size != self.size:
            self.size, self.alive = size, now
        if self.process.poll() is None:
            if self.spent + now - self.started > self.limit:
                self.stop()
                self.ended = self.limited = True
            elif now - self.alive > self.stall:
                self.stop()
                self._fate("timed out", f"no sign of life for {self.stall:.0f} s")
            else:
                return False
        else:
            self._close()
            if self.process.returncode == 0 or self.wrapped:
                self.ended = True
            else:
                self._fate("crashed", f"exit code {self.process.returncode}: {self.last_words()}")
        return True

    def stop(self) -> None:
        """Ends the process and those that it has started; its check may be begun again."""
        assert self.process is not None
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(GRACE)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self._close()

    def unlimit(self) -> None:
        """Lets it go on where its limit has ended it."""
        self.limit = float("inf")
        self.ended, self.limited = self.ended and not self.limited, False

    def _close(self) -> None:
        self.spent += time.monotonic() - self.started

    def _fate(self, status: str, why: str) -> None:
        """Of the check that was begun and not ended, if any; the job goes on behind it."""
        self.crashes += 1
        lines = self.lines()
        begun = [line["begin"] for line in lines if "begin" in line]
        done = {line["done"] for line in lines if "done" in line}
        if begun and begun[-1] not in done:
            self.fates[begun[-1]] = status, why
        elif not lines:  # not even a plan
            self.fates[self.name] = status, why
            self.ended = True
        if self.crashes >= CRASHES:
            self.ended, self.why = True, f"given up after {CRASHES} crashes"

    def last_words(self) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no message")

    def outcomes(self) -> list[Outcome]:
        """Of each check, those included that never ran."""
        if self.wrapped:
            return [self.verdict()]
        lines = self.lines()
        done = {line["done"]: line for line in lines if "done" in line}
        plan = [name for line in lines if "plan" in line for name in line["plan"]]
        found = []
        for name in plan or [self.name]:
            if name in done:
                line = done[name]
                found.append(Outcome(self.section, name, line["status"], line["detail"], line["seconds"]))
            else:
                found.append(Outcome(self.section, name, *self.fates.get(name, ("never ran", self.why))))
        return found

    def verdict(self) -> Outcome:
        """Of a sanitizer: the summaries that it prints, one for each process."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        ran = sum(line.get("status") == "ok" for line in self.lines())
        planned = sum(len(line["plan"]) for line in self.lines() if "plan" in line)
        so_far = f"{ran} of {planned} calls"
        counts = [int(n) for n in re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", text)]
        if errors := sum(counts):
            found = re.findall(r"^=+ +(.*)", text, re.MULTILINE)
            reports = [line for line in found if "SUMMARY" not in line and "COMPUTE-SANITIZER" not in line]
            return self._of_sanitizer("failed", f"{errors} in {so_far}; {' '.join(reports[:6])}")
        if self.fates:
            status, why = list(self.fates.values())[-1]
            return self._of_sanitizer(status, f"{so_far}; {why}")
        if not self.ended:
            return self._of_sanitizer("never ran", f"{so_far}; {self.why}")
        if not counts or not ran:
            return self._of_sanitizer("crashed", f"{so_far}; {self.last_words()}")
        return self._of_sanitizer("ok", f"0 in {so_far}")

    def _of_sanitizer(self, status: str, detail: str) -> Outcome:
        return Outcome(self.section, self.name, status, detail, self.spent)

    def rows(self) -> list[engine.Row]:
        return [engine.Row(**row) for line in self.lines() for row in line.get("rows", ())]

    def peaks(self) -> list[dict[str, float]]:
        return [line["peaks"] for line in self.lines() if "peaks" in line]


def run(jobs: list[Job], at_once: int, until: float, save: Callable[[], None]) -> None:
    """Runs those that have not ended, so many side by side, in their order; what runs at `until` is stopped."""
    waiting, saved = [job for job in jobs if not job.ended], time.monotonic()
    running: list[Job] = []
    try:
        while (waiting or running) and time.monotonic() < until:
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0))
                running[-1].start()
            for job in [job for job in running if job.poll()]:
                running.remove(job)
                if not job.ended:
                    waiting.insert(0, job)
                save()
            if time.monotonic() - saved > EVERY:
                save()
                saved = time.monotonic()
            time.sleep(PAUSE)
    finally:
        for job in running:
            job.stop()
        save()


def sanitizer() -> str | None:
    """compute-sanitizer on PATH or in the CUDA toolkit."""
    places = [os.environ[name] for name in CUDA_HOMES if name in os.environ] + ["/usr/local/cuda"]
    return shutil.which("compute-sanitizer") or next(
        (found for place in places if (found := shutil.which("compute-sanitizer", path=f"{place}/bin"))), None
    )


def plan(folder: Path, at_once: int) -> tuple[list[Job], list[Job], list[Outcome]]:
    """Jobs side by side and jobs on a quiet GPU, the most important ones first; and what cannot be run."""
    shards = {kind: min(most, at_once) for kind, most in SHARDS.items()}
    checks = [Job(f"{kind}:{i}/{n}", folder) for kind, n in shards.items() for i in range(n)]
    missing = []
    if (tool := sanitizer()) is None:
        where = "neither on PATH nor in CUDA_HOME"
        missing = [Outcome("sanitizer", name, "skipped", f"compute-sanitizer is {where}") for name in SANITIZERS]
    else:
        options = ("--report-api-errors", "no", "--target-processes", "application-only")
        checks += [Job(name, folder, wrapped=(tool, "--tool", name, *options), stall=LONG_STALL) for name in SANITIZERS]
    ordered = [*FIRST_TABLES, *(name for name in names() if name not in FIRST_TABLES)]
    tables = [
        Job(f"table:{name}", folder, limit=TABLE_LIMITS.get(name, TABLE_LIMIT), stall=LONG_STALL) for name in ordered
    ]
    return checks, tables, missing


def selected(jobs: list[Job], only: list[str]) -> list[Job]:
    """Those of a section, or named as a whole."""
    return [job for job in jobs if not only or job.section in only or job.name in only]


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    if not torch.cuda.is_available():
        print("gpu: torch finds no CUDA device here", file=sys.stderr)
        return 2
    deadline = time.monotonic() + 60 * arguments.budget
    started = time.monotonic()
    at_once = arguments.jobs or max(2, (os.cpu_count() or 2) - 2)
    command = shlex.join(["python", "-m", "bigmodel_fast.benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)])
    findings = Findings(machine(torch.device("cuda"), command))
    signal.signal(signal.SIGTERM, interrupt)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bigmodel_fast-gpu-") as folder:
        checks, tables, missing = plan(Path(folder), at_once)
        checks, tables = selected(checks, arguments.only), selected(tables, arguments.only)
        missing = [o for o in missing if not arguments.only or o.section in arguments.only]

        def save() -> None:
            findings.outcomes = [o for job in (*checks, *tables) for o in job.outcomes()] + missing
            findings.rows = [row for job in tables for row in job.rows()]
            for peaks in (p for job in tables for p in job.peaks()):
                findings.peaks = {name: max(peak, findings.peaks.get(name, 0.0)) for name, peak in peaks.items()}
            findings.seconds = time.monotonic() - started
            findings.save(arguments.out)

        share = SHARE if tables else 1.0
        try:
            run(checks, at_once, started + share * (deadline - started), save)
            run(tables, 1, deadline, save)
            run(checks, at_once, deadline, save)
            for job in tables:
                job.unlimit()
            run(tables, 1, deadline, save)
        except KeyboardInterrupt:
            print("gpu: interrupted", file=sys.stderr)
    print("\n".join(findings.summary()))
    print(f"written to {arguments.out}/results.md and results.json")
    return 1 if findings.failed else 0


def interrupt(*_: object) -> None:
    """SIGTERM is answered as Ctrl-C is: by ending what runs and keeping what was found."""
    raise KeyboardInterrupt


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bigmodel_fast.benchmarks.gpu",
        description="Finds out what works on this GPU, and how fast; writes results.md and results.json.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--budget", type=minutes, default=MINUTES, metavar="MINUTES", help="when to be done")
    parser.add_argument("--out", type=Path, default=Path("docs/gpu"), metavar="FOLDER", help="where results go")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="checks side by side (0: CPUs less two)")
    sections = "numerics, facts, determinism, prepare, sanitizer, table, or a job: table:attention, memcheck"
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="NAMES", help=sections)
    return parser.parse_args(argv)


def minutes(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())

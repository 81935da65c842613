"""What a run leaves behind: a table on the terminal, and JSON, CSV, Markdown and a chart in a folder."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import bigmodel_fast
from bigmodel_fast._machine import cpu_name

from .cases import OURS
from .engine import Row, fill_shares, geometric_means

if TYPE_CHECKING:
    from rich.console import Console

COLUMNS = ("provider", "time", "quartiles", "rate", "of peak", "speed-up", "memory", "error")
FORMAT = 1  # of the JSON; to be raised when fields change their meaning


@dataclass
class Report:
    """Everything one run of `bench` found out."""

    machine: dict[str, Any]
    peaks: dict[str, float]  # operations per second in bf16 and fp32, bytes per second of a copy
    rows: list[Row]

    def save(self, folder: Path) -> None:
        """Writes bench.json, bench.csv, bench.md and a chart for each operator."""
        from .chart import save_charts

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.json").write_text(json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")
        (folder / "bench.md").write_text(self.markdown())
        with (folder / "bench.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Row)])
            writer.writeheader()
            writer.writerows(asdict(row) for row in self.rows)
        save_charts(self.rows, self.caption(), folder)

    @classmethod
    def load(cls, path: Path) -> Report:
        """Reads bench.json. ValueError if it is none."""
        try:
            data = json.loads(path.read_text())
            if data["format"] != FORMAT:
                raise ValueError(f"{path}: has format {data['format']}, this version reads {FORMAT}")
            return cls(data["machine"], data["peaks"], [Row(**row) for row in data["rows"]])
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            raise ValueError(f"{path}: is no bench.json of `bigmodel-fast bench --out`") from None

    @classmethod
    def merged(cls, reports: Sequence[Report]) -> Report:
        """Runs on one machine as one: of what was measured twice, the later; shares are of the highest peaks.

        ValueError if anything but their commits, commands and dates differs.
        """
        machine = reports[0].machine
        for other in reports[1:]:
            for name in sorted({*machine, *other.machine} - {"commit", "command", "date"}):
                if machine.get(name) != other.machine.get(name):
                    raise ValueError(f"runs differ in {name}: {machine.get(name)} and {other.machine.get(name)}")
        rows = {(r.op, r.case, r.dtype, r.direction, r.provider): r for report in reports for r in report.rows}
        peaks = {name: max(report.peaks[name] for report in reports) for name in reports[0].peaks}
        fill_shares(list(rows.values()), peaks)
        commits, commands = (
            dict.fromkeys(report.machine[name] for report in reports) for name in ("commit", "command")
        )
        machine = {**machine, "commit": ", then ".join(commits), "command": "`, then `".join(commands)}
        return cls(machine, peaks, list(rows.values()))

    def caption(self) -> str:
        """The machine in a line."""
        m = self.machine
        what = m.get("gpu") or f"{m['cpu']}, {m['isa']}, {m['threads']} threads"
        return f"{what}; torch {m['torch']}, bigmodel_fast {m['bigmodel_fast']} ({m['commit']}), {m['date'][:10]}"

    def peaks_line(self) -> str:
        p = self.peaks
        return (
            f"peaks measured in this run: bf16 {p['bf16'] / 1e9:.0f} GFLOP/s, fp32 {p['fp32'] / 1e9:.0f} GFLOP/s, "
            f"copy {p['copy'] / 1e9:.1f} GB/s"
        )

    def print(self, console: Console) -> None:
        """The machine, the tables, an operator each, and the geometric means."""
        from rich.table import Table

        console.print(f"{self.caption()}\n{self.peaks_line()}\n", soft_wrap=True)
        for op, rows in by_op(self.rows):
            table = Table(title=op, title_style="bold", title_justify="left", header_style="bold", pad_edge=False)
            for column in ("case", *COLUMNS):
                table.add_column(column, justify="left" if column in ("case", "provider") else "right", no_wrap=True)
            for group, members in by_case(rows):
                for i, row in enumerate(members):
                    style = "green" if row.provider == OURS and (row.speedup or 0) >= 1 else None
                    style = "red" if row.status != "ok" else style
                    table.add_row(group if i == 0 else "", *cells(row), style=style)
                table.add_section()
            console.print(table)
            for line in mean_lines(rows):
                console.print(f"  {line}")
            console.print()
        for row in failures(self.rows):
            console.print(f"{row.op}, {row.case}, {row.dtype}, {row.provider}: {row.status}", style="red", markup=False)

    def markdown(self) -> str:
        """The tables as Markdown."""
        lines = [f"{self.caption()}", "", f"`{self.machine['command']}`; {self.peaks_line()}.", ""]
        for op, rows in by_op(self.rows):
            lines += [f"## {op}", "", *case_table(rows), "", *(f"- {line}" for line in mean_lines(rows)), ""]
        return "\n".join(lines)


def by_op(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    for op, members in groupby(rows, key=lambda row: row.op):
        yield op, list(members)


def by_case(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows that can be compared: of one case, dtype and direction."""
    for key, members in groupby(rows, key=lambda row: (row.case, row.dtype, row.direction)):
        yield ", ".join(key), list(members)


def case_table(rows: Iterable[Row]) -> list[str]:
    """A table in Markdown, a line each."""
    lines = [f"| case | {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * (len(COLUMNS) - 1)]
    for group, members in by_case(rows):
        for i, row in enumerate(members):
            lines.append(f"| {group if i == 0 else ''} | {' | '.join(cells(row))} |")
    return lines


def cells(row: Row) -> tuple[str, ...]:
    """One cell for each of COLUMNS."""
    if row.seconds is None or row.low is None or row.high is None or row.rate is None or row.share is None:
        return row.provider, row.status.split(":")[0], "", "", "", "", "", _error(row)
    return (
        row.provider,
        duration(row.seconds),
        f"-{(row.seconds - row.low) / row.seconds:.0%} +{(row.high - row.seconds) / row.seconds:.0%}",
        f"{row.rate / 1e9:.1f} G{row.unit}/s",
        f"{row.share:.0%}",
        "" if row.speedup is None else f"{row.speedup:.2f}x",
        "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.1f} MiB",
        _error(row),
    )


def _error(row: Row) -> str:
    return "" if row.error is None else f"{row.error:.1e}"


def duration(seconds: float) -> str:
    """Three digits and a fitting unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def mean_lines(rows: list[Row]) -> list[str]:
    """The geometric mean of the speed-ups over eager, a line for each dtype, direction and provider."""
    return [
        f"{provider}, {dtype}, {direction}: {mean:.2f}x eager (geometric mean of {count})"
        for (dtype, direction, provider), (mean, count) in geometric_means(rows).items()
        if count > 1
    ]


def failures(rows: Iterable[Row]) -> list[Row]:
    """One row for each provider that was wrong or failed on a case."""
    return list({(r.op, r.case, r.dtype, r.provider): r for r in rows if r.status != "ok"}.values())


def machine(device: torch.device, command: str) -> dict[str, Any]:
    """Where and when a run was made, and with what."""
    return {
        "cpu": cpu_name(),
        "isa": bigmodel_fast.cpu_isa(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "driver": _driver() if device.type == "cuda" else None,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bigmodel_fast": bigmodel_fast.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str:
    """The version of NVIDIA's driver; "unknown" where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _commit() -> str:
    """Of the source tree the benchmarks lie in; "+" after it means with changes. "unknown" outside of one."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")

"""What `gpu.py` leaves behind: results.json with everything, results.md with what a reader looks for first."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import engine, load
from .report import Report, by_op, case_table, duration, mean_lines

FORMAT = 1  # of the JSON; to be raised when fields change their meaning
STATUSES = ("ok", "failed", "crashed", "timed out", "skipped", "never ran")
BAD = ("failed", "crashed", "timed out")
FEW = 5  # names of checks that never ran, of each section
LONGEST = 300  # characters of a failure's message in Markdown; JSON has all of it


@dataclass
class Outcome:
    """What became of a check."""

    section: str
    name: str
    status: str  # one of STATUSES
    detail: str = ""
    seconds: float = 0.0


@dataclass
class Findings:
    """Everything that is known so far."""

    machine: dict[str, Any]
    outcomes: list[Outcome] = field(default_factory=list)
    rows: list[engine.Row] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0  # that the run has taken

    def save(self, folder: Path) -> None:
        """Writes both files; each is whole at any time."""
        if self.peaks:
            engine.fill_shares(self.rows, self.peaks)
        text = json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1)
        for name, content in (("results.json", text + "\n"), ("results.md", self.markdown())):
            unfinished = folder / f"{name}.unfinished"
            unfinished.write_text(content, encoding="utf-8")
            os.replace(unfinished, folder / name)

    @property
    def failed(self) -> bool:
        """Whether anything of ours is wrong, failed, crashed or hung."""
        ours = any(row.status != "ok" for row in self.rows if row.provider.startswith("bigmodel_fast"))
        return ours or any(o.status in BAD for o in self.outcomes)

    def markdown(self) -> str:
        m = self.machine
        lines = [
            f"# Results on {m['gpu']}",
            "",
            f"{m['date']}, {self.seconds:.0f} s; driver {m['driver']}, CUDA {m['cuda']}, torch {m['torch']}, "
            f"triton {m['triton']}, python {m['python']}, bigmodel_fast {m['bigmodel_fast']} (commit {m['commit']})",
            "",
            f"`{m['command']}`",
            "",
            *self.summary(),
            *self.listed("What is wrong, failed, crashed or hung", BAD),
            *self.listed("What never ran", ("skipped", "never ran")),
            *self.training(),
        ]
        if self.rows and self.peaks:
            report = Report(m, self.peaks, self.rows)
            lines += ["## Tables", "", f"{report.peaks_line()}; 'of peak' is a share of these.", ""]
            for op, rows in by_op(self.rows):
                lines += [f"### {op}", "", *case_table(rows), "", *(f"- {line}" for line in mean_lines(rows)), ""]
        return "\n".join(lines) + "\n"

    def summary(self) -> list[str]:
        """How many checks of each section came to what."""
        lines = [f"| section | {' | '.join(STATUSES)} |", "|---|" + "---:|" * len(STATUSES)]
        for section in dict.fromkeys(o.section for o in self.outcomes):
            counts = Counter(o.status for o in self.outcomes if o.section == section)
            lines.append(f"| {section} | {' | '.join(str(counts[s] or '') for s in STATUSES)} |")
        return [*lines, ""]

    def listed(self, title: str, statuses: tuple[str, ...]) -> list[str]:
        """The outcomes of these statuses, and of the tables the providers that did not work."""
        chosen = [o for o in self.outcomes if o.status in statuses]
        found = [f"{o.section}: {o.name}: {o.status}{_because(o.detail)}" for o in chosen if o.status != "never ran"]
        cut = [o for o in chosen if o.status == "never ran"]
        for section, why in dict.fromkeys((o.section, o.detail) for o in cut):
            names = [o.name for o in cut if (o.section, o.detail) == (section, why)]
            few = "; ".join(names[:FEW]) + ("; ..." if len(names) > FEW else "")
            found.append(f"{section}: {len(names)} never ran{_because(why)}: {few}")
        if statuses == BAD:
            rows = {(r.op, r.case, r.dtype, r.provider): r for r in self.rows if r.status != "ok"}.values()
            found += [f"{r.op}: {r.case}, {r.dtype}: {r.provider} {_short(r.status)}" for r in rows]
        return [f"## {title}", "", *(f"- {line}" for line in found or ["nothing"]), ""]

    def training(self) -> list[str]:
        """The step of GPT-2 124M: tokens per second and MFU, which is the share of cuBLAS's measured peak."""
        rows = [row for row in self.rows if row.op == "gpt" and row.seconds]
        if not rows:
            return []
        lines = ["## Training step", "", "| case | provider | time | tokens/s | MFU | memory | speed-up |"]
        lines.append("|---|---|---:|---:|---:|---:|---:|")
        for row in rows:
            batch, length = load("gpt").case(row.case, "cuda").options["batch"]
            assert row.seconds is not None
            lines.append(
                f"| {row.case}, {row.dtype} | {row.provider} | {duration(row.seconds)} "
                f"| {batch * length / row.seconds:,.0f} | {'' if row.share is None else f'{row.share:.1%}'} "
                f"| {'' if row.extra_bytes is None else f'{row.extra_bytes / 2**30:.1f} GiB'} "
                f"| {'' if row.speedup is None else f'{row.speedup:.2f}x'} |"
            )
        return [*lines, ""]


def _because(detail: str) -> str:
    return f" ({_short(detail)})" if detail else ""


def _short(text: str) -> str:
    """One line that fits, and breaks no table."""
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."

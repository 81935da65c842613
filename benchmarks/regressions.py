"""Compares two runs: did bigmodel_fast become slower beside torch eager?

Times themselves are not compared, since the machine may have been slower; the speed-up over eager in the same run is.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from .cases import OURS
from .engine import Row

Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Change:
    """A case, dtype and direction in both runs, with the speed-up over eager before and after."""

    key: Key
    before: float | None
    after: float | None
    broken: bool = False  # was right before, and is wrong or fails now

    @property
    def slowdown(self) -> float | None:
        """By what share longer it takes, in units of eager's time; None if a speed-up is missing."""
        if self.before is None or self.after is None:
            return None
        return self.before / self.after - 1

    def fails(self, over: float) -> bool:
        return self.broken or (self.slowdown is not None and self.slowdown > over)


def changes(before: list[Row], after: list[Row]) -> list[Change]:
    """What bigmodel_fast did in both runs."""
    old, new = _ours(before), _ours(after)
    return [
        Change(key, row.speedup, new[key].speedup, row.status == "ok" and new[key].status != "ok")
        for key, row in old.items()
        if key in new
    ]


def _ours(rows: list[Row]) -> dict[Key, Row]:
    return {(r.op, r.case, r.dtype, r.direction): r for r in rows if r.provider == OURS}


def table(found: list[Change], over: float) -> Table:
    """Worst first; regressions in red."""
    result = Table(header_style="bold", pad_edge=False)
    for column in ("case", "before", "after", "change"):
        result.add_column(column, justify="left" if column == "case" else "right")
    for change in sorted(found, key=_badness, reverse=True):
        slower = change.slowdown
        verdict = "broken" if change.broken else "no eager to compare with" if slower is None else f"{slower:+.1%}"
        style = "red" if change.fails(over) else "green" if slower is not None and slower < -over else None
        result.add_row(", ".join(change.key), *(_times(s) for s in (change.before, change.after)), verdict, style=style)
    return result


def _badness(change: Change) -> float:
    if change.broken:
        return float("inf")
    return float("-inf") if change.slowdown is None else change.slowdown


def _times(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}x eager"


def parse_share(text: str) -> float:
    """ "5%" or "0.05" as 0.05. ValueError for anything else."""
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise ValueError(f"must be a share such as 5% or 0.05, not {text!r}")
    return share

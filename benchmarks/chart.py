"""Bar charts of the speed-up over torch eager: one for each operator, and one of all operators' geometric means."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .cases import COMPILE, EAGER, OURS
from .engine import Row, geometric_means
from .report import by_op

COLOURS = {OURS: "#d1495b", COMPILE: "#30638e"}
OTHERS = ("#edae49", "#66a182", "#8d6a9f")
BAR, GAP = 0.26, 0.14  # inches: of a bar, and between groups

# A label, and for each dtype the speed-up of each provider.
Groups = dict[str, dict[str, dict[str, float]]]


def save_charts(rows: list[Row], caption: str, folder: Path) -> None:
    """Writes <op>.png for each operator, and summary.png if there are several."""
    summary: Groups = {}
    operators = list(by_op(rows))
    for op, members in operators:
        groups: Groups = {}
        for row in members:
            if row.speedup is not None and row.provider != EAGER:
                _add(groups, f"{row.case}, {row.direction}", row.dtype, row.provider, row.speedup)
        if groups:
            _draw(groups, f"{op}: speed-up over torch eager", caption, folder / f"{op}.png")
        for (dtype, direction, provider), (mean, _) in geometric_means(members).items():
            if direction == members[-1].direction and provider == OURS:  # the last direction is the whole
                _add(summary, op, dtype, provider, mean)
    if len(operators) > 1 and summary:
        title = "bigmodel_fast: speed-up over torch eager, geometric mean over the cases of each operator"
        _draw(summary, title, caption, folder / "summary.png")


def _add(groups: Groups, label: str, dtype: str, provider: str, speedup: float) -> None:
    groups.setdefault(label, {}).setdefault(dtype, {})[provider] = speedup


def _draw(groups: Groups, title: str, caption: str, path: Path) -> None:
    """Horizontal bars, a panel for each dtype."""
    dtypes = sorted({dtype for group in groups.values() for dtype in group})
    providers = sorted({p for group in groups.values() for bars in group.values() for p in bars}, key=_ours_first)
    colour = _colours(providers)
    longest = max(s for group in groups.values() for bars in group.values() for s in bars.values())
    heights = {label: BAR * max(map(len, group.values())) for label, group in groups.items()}
    height = sum(heights.values()) + GAP * len(groups)
    width = 4.0 + 3.6 * len(dtypes)
    figure, panels = plt.subplots(
        1, len(dtypes), figsize=(width, height + 1.5), dpi=120, layout="constrained", sharey=True, squeeze=False
    )
    for dtype, axes in zip(dtypes, panels[0], strict=True):
        top, ticks = 0.0, []
        for label, group in groups.items():
            for i, (name, speedup) in enumerate(
                sorted(group.get(dtype, {}).items(), key=lambda bar: _ours_first(bar[0]))
            ):
                y = top + (i + 0.5) * BAR
                axes.barh(y, speedup, BAR * 0.86, color=colour[name], zorder=2)
                axes.text(speedup, y, f" {speedup:.2f}x", va="center", fontsize=7.5, color="#333333")
            ticks.append(top + heights[label] / 2)
            top += heights[label] + GAP
        axes.axvline(1.0, color="#333333", linewidth=1, zorder=3)
        axes.set_yticks(ticks, list(groups), fontsize=8)
        axes.set_ylim(top, -GAP)
        axes.set_xlim(0, 1.18 * max(longest, 1.0))
        axes.set_title(dtype, loc="left", fontsize=9, fontweight="bold")
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color="#e4e7eb", zorder=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    figure.supxlabel(
        f"times as fast as torch eager (the line at 1); longer is better\n{caption}", fontsize=7.5, color="#616e7c"
    )
    if len(providers) > 1:
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour[name]) for name in providers]
        figure.legend(handles, providers, fontsize=8, frameon=False, loc="outside upper right", ncols=len(providers))
    figure.savefig(path)
    plt.close(figure)


def _ours_first(provider: str) -> tuple[bool, str]:
    return provider != OURS, provider


def _colours(providers: list[str]) -> dict[str, str]:
    """A colour for each provider; the usual ones have the same in every chart."""
    others = iter(OTHERS * len(providers))
    return {name: COLOURS.get(name) or next(others) for name in providers}

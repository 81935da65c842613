"""The picture of one or more fine-tuning runs: losses, and the figure that the best step is chosen by."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .classification import new_figure, save_figure
from .metrics import read_metrics, smoothed

COLOURS = ("#1f5fa8", "#d1495b", "#3a7d44", "#8d6a9f")


def plot_curves(runs: Mapping[str, Path], metric: str, picture: Path) -> None:
    """Draws, for each run's metrics.jsonl by name, the training and validation loss and `metric` by step, as a PNG."""
    panels = ["loss (nats)"] if metric == "loss" else ["loss (nats)", metric]
    figure = new_figure(5.6 * len(panels) + 0.6, 4.4)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for colour, (name, path) in zip(COLOURS * len(runs), runs.items(), strict=False):
        lines = read_metrics(path)
        _draw(axes[0], lines, "loss", colour, None, line=True)
        _draw(axes[0], lines, "validation_loss", colour, name)
        if metric != "loss":
            _draw(axes[1], lines, metric, colour, name)
    for panel, title in zip(axes, panels, strict=True):
        panel.set_xlabel("step")
        panel.set_title(title, loc="left", fontweight="bold")
        panel.grid(True, color="#e6e6e6")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, title="line: training, dots: validation" if panel is axes[0] else None)
    save_figure(figure, picture)


def _draw(
    panel: Any, lines: list[dict[str, Any]], key: str, colour: str, name: str | None, *, line: bool = False
) -> None:
    points = [(row["step"], row[key]) for row in lines if row.get(key) is not None]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    if line:
        panel.plot(steps, smoothed(values), color=colour, linewidth=1.5, alpha=0.45)
        return
    panel.plot(steps, values, color=colour, linewidth=2, marker="o", markersize=4, label=name)
    panel.annotate(
        f"{values[-1]:.3f}", (steps[-1], values[-1]), textcoords="offset points", xytext=(-4, 8), ha="right",
        color=colour, fontweight="bold",
    )  # fmt: skip

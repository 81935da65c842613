"""metrics.jsonl, TensorBoard events, and the picture of the losses."""

import json
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .report import Evaluation, Step


class MetricsLog:
    """Appends a line of JSON for each step and each evaluation to `folder`/metrics.jsonl.

    Args:
        after: step that is resumed from; lines of later ones, which the new run will write again, are dropped.
        tensorboard: write TensorBoard events to `folder`/tensorboard too (ImportError without the package).
    """

    def __init__(self, folder: Path, after: int = 0, tensorboard: bool = False):
        self.path = folder / "metrics.jsonl"
        self._open(after)
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)

    def _open(self, after: int) -> None:
        kept = [line for line in read_metrics(self.path) if line["step"] <= after]
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(unfinished, self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def rewind(self, after: int) -> None:
        """Drops the lines of steps later than `after`: the run has gone back."""
        self._file.close()
        self._open(after)

    def step(self, step: Step) -> None:
        """Loss, learning rate, gradient norm and speed of one step."""
        values = asdict(step)
        for name in ("progress", "left"):
            del values[name]
        self.write(values, "train")

    def evaluation(self, evaluation: Evaluation) -> None:
        """Validation loss, perplexity and bits per byte."""
        values = asdict(evaluation)
        values["validation_loss"] = values.pop("loss")
        self.write(values, "validation")

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def write(self, values: dict[str, float], group: str) -> None:
        """Numbers by name, "step" among them; `group` is where TensorBoard shows them."""
        self._file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in values.items()}) + "\n")
        self._file.flush()  # whoever follows the file sees each step
        if self._board is not None:
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(f"{group}/{name}", value, values["step"])


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; a last one that a crash cut short is left out. No file: no lines."""
    lines = []
    if path.exists():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                continue
    return lines


def plot_losses(metrics: Path, picture: Path) -> None:
    """Draws training and validation loss by step, from a metrics.jsonl, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    train = [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]
    validation = [(line["step"], line["validation_loss"]) for line in lines if line.get("validation_loss") is not None]
    figure = Figure(figsize=(8, 4.8), dpi=144, layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9db8d9", linewidth=1, label="training, each step")
        axes.plot(steps, smoothed(losses), color="#1f5fa8", linewidth=2, label="training, smoothed")
    if validation:
        steps, losses = zip(*validation, strict=True)
        axes.plot(steps, losses, color="#d1495b", linewidth=2, marker="o", markersize=4, label="validation")
        axes.annotate(
            f"{losses[-1]:.3f}",
            (steps[-1], losses[-1]),
            textcoords="offset points",
            xytext=(-4, 8),
            ha="right",
            color="#d1495b",
            fontweight="bold",
        )
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(f"Loss of {picture.parent.name}", loc="left", fontweight="bold")
    axes.grid(True, color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if train or validation:
        axes.legend(frameon=False)
    unfinished = picture.with_suffix(".unfinished.png")
    figure.savefig(unfinished)
    os.replace(unfinished, picture)


def smoothed(values: tuple[float, ...]) -> list[float]:
    """Exponential average over a fortieth of the values (at least five), corrected for its start."""
    keep = 1 - 1 / max(5.0, len(values) / 40)
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average, weight = keep * average + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(average / weight)
    return smoothed

"""What a classifier got right and wrong: figures by class, the confusion matrix and the mistakes as pictures."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Images


@dataclass(frozen=True)
class ClassReport:
    """Of one class: shares in [0, 1], and how many samples it has."""

    name: str
    precision: float
    recall: float
    f1: float
    samples: int


@dataclass(frozen=True)
class Classification:
    """Of a set of samples: shares right, and confusion[i][j]: samples of class i that were called j.

    The macro figures are means over the classes; mcc is Matthews' correlation coefficient (Gorodkin 2004 for several
    classes), in [-1, 1].
    """

    accuracy: float
    macro_precision: float
    macro_recall: float
    macro_f1: float
    mcc: float
    classes: tuple[ClassReport, ...]
    confusion: tuple[tuple[int, ...], ...]

    def __str__(self) -> str:
        width = max(5, *(len(c.name) for c in self.classes))
        lines = [f"{'class'.ljust(width)}  precision   recall       F1  samples"]
        lines += [
            f"{c.name.ljust(width)}  {c.precision:9.2%} {c.recall:8.2%} {c.f1:8.2%} {c.samples:8}" for c in self.classes
        ]
        return "\n".join([*lines, f"accuracy {self.accuracy:.2%}, macro F1 {self.macro_f1:.2%}, MCC {self.mcc:.4f}"])


def classify(predicted: Tensor, labels: Tensor, classes: tuple[str, ...]) -> Classification:
    """The report on `predicted` classes [N] beside `labels` [N]; a share with nothing to divide by is 0."""
    from sklearn.metrics import confusion_matrix, matthews_corrcoef, precision_recall_fscore_support

    numbers = range(len(classes))
    truth, guess = labels.numpy(), predicted.numpy()
    precision, recall, f1, samples = precision_recall_fscore_support(truth, guess, labels=numbers, zero_division=0)
    matrix = confusion_matrix(truth, guess, labels=numbers)
    return Classification(
        float((truth == guess).mean()),
        float(precision.mean()),
        float(recall.mean()),
        float(f1.mean()),
        float(matthews_corrcoef(truth, guess)),
        tuple(
            ClassReport(name, float(precision[i]), float(recall[i]), float(f1[i]), int(samples[i]))
            for i, name in enumerate(classes)
        ),
        tuple(tuple(int(n) for n in row) for row in matrix),
    )


def new_figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    return FigureCanvasAgg(Figure(figsize=(width, height), dpi=144, layout="constrained")).figure


def save_figure(figure: Any, picture: Path) -> None:
    unfinished = picture.with_suffix(".unfinished.png")
    figure.savefig(unfinished)
    os.replace(unfinished, picture)


def plot_confusion(report: Classification, picture: Path) -> None:
    """Draws the confusion matrix as a PNG; colours are shares of a class, numbers are samples."""
    names = [c.name for c in report.classes]
    n = len(names)
    side = min(20.0, max(4.5, 0.55 * n + 1.5))
    figure = new_figure(side, side)
    axes = figure.subplots()
    counts = torch.tensor(report.confusion, dtype=torch.float64)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(n), names, rotation=90 if max(map(len, names)) > 3 else 0)
    axes.set_yticks(range(n), names)
    for i in range(n if n <= 30 else 0):
        for j in range(n):
            if counts[i, j]:
                colour = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, f"{int(counts[i, j])}", ha="center", va="center", fontsize=8, color=colour)
    axes.set_xlabel("called")
    axes.set_ylabel("class")
    axes.set_title(f"accuracy {report.accuracy:.2%}", loc="left", fontweight="bold")
    save_figure(figure, picture)


def plot_mistakes(images: Images, logits: Tensor, picture: Path, most: int = 40) -> int:
    """Draws the images whose class was missed, the surest mistakes first, as a PNG; returns how many there are."""
    predicted = logits.argmax(1)
    wrong = (predicted != images.labels).nonzero()[:, 0]
    surest = logits.softmax(1).max(1).values[wrong].argsort(descending=True)
    shown = wrong[surest][:most].tolist()
    columns = 8
    rows = max(1, -(-len(shown) // columns))
    figure = new_figure(columns * 1.1, rows * 1.35 + 0.4)
    figure.suptitle(f"{len(wrong)} of {len(images)} missed", x=0.02, ha="left", fontweight="bold")
    for axes, i in zip(figure.subplots(rows, columns, squeeze=False).flat, [*shown, *[None] * most], strict=False):
        axes.axis("off")
        if i is None:
            continue
        pixels = images.pixels[i].permute(1, 2, 0)
        axes.imshow((pixels[..., 0] if pixels.shape[2] == 1 else pixels).numpy(), cmap="gray")
        axes.set_title(f"{images.classes[images.labels[i]]} → {images.classes[predicted[i]]}", fontsize=8)
    save_figure(figure, picture)
    return len(wrong)

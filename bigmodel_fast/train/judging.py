"""A model and a task's examples: how the one does at the other, as finetune and evaluate measure and report it."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._packed_weights import packed_weights
from ..data import Example
from ..data.buckets import by_length
from . import durable
from .classification import plot_confusion
from .finetune_config import FinetuneConfig
from .pretrained import Pretrained
from .tasks import TASKS, Feature, Judgement, Task, TaskOptions


def make_task(config: FinetuneConfig, source: Pretrained) -> Task:
    """The task of a config, for the tokenizer of a model."""
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(TaskOptions)}
    options["max_length"] = source.max_length(config.max_length)
    return TASKS[config.task](source.tokenizer, TaskOptions(**options))


@torch.no_grad()
def judge(
    model: Any, task: Task, features: list[Feature], examples: Sequence[Example], autocast: torch.autocast,
    device: torch.device, batch: int, *, final: bool = True,
) -> Judgement:  # fmt: skip
    """How a model does at examples, the longest first."""

    def batches() -> Iterator[tuple[list[Feature], dict[str, Tensor]]]:
        for numbers in by_length([len(f) for f in features], batch):
            chosen = [features[i] for i in numbers]
            yield chosen, {key: tensor.to(device) for key, tensor in task.collate(chosen).items()}

    model.eval()
    with autocast, packed_weights(model.parameters()):
        return task.judge(model, batches(), examples, final=final)


def report_of(judgement: Judgement, task: Task) -> dict[str, Any]:
    """What report.json says of a judgement."""
    report: dict[str, Any] = {"task": task.name, "loss": judgement.loss, "metrics": judgement.metrics}
    if judgement.classification is not None:
        found = dataclasses.asdict(judgement.classification)
        report |= {"classes": list(found["classes"]), "confusion": [list(row) for row in found["confusion"]]}
    return report | judgement.details


def write_report(report: dict[str, Any], judgement: Judgement, out: Path) -> list[str]:
    """Writes report.json and, for classes, confusion.png into a folder; returns their names."""
    durable.write_text(out / "report.json", json.dumps(report, indent=1) + "\n")
    if judgement.classification is None:
        return ["report.json"]
    plot_confusion(judgement.classification, out / "confusion.png")
    return ["report.json", "confusion.png"]

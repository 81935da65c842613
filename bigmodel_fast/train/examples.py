"""Where the examples of finetune and evaluate come from: files, a held-out share, or the standard library."""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..data import DataError, Example, find_tables, labelled_snippets, read_examples
from .finetune_config import FinetuneConfig
from .tasks import TASKS


def load_examples(config: FinetuneConfig) -> tuple[list[Example], list[Example]]:
    """Examples to train and to validate on.

    Raises:
        DataError: a file that is not there, malformed, or without the columns of the task.
    """
    if config.data is None:
        return labelled_snippets()
    path, held_out = Path(config.data).expanduser(), config.validation and Path(config.validation).expanduser()
    if path.is_dir():
        path, found = find_tables(path)
        held_out = held_out or found
    train = read(path, config.task, config.columns.given(), config.header)
    if held_out is not None and held_out:
        return train, read(held_out, config.task, config.columns.given(), config.header)
    return split(train, config.validation_share, config.seed)


def read(path: str | Path, task: str, columns: Mapping[str, str], header: str) -> list[Example]:
    """The examples in a file that a task reads."""
    return read_examples(path, TASKS[task].fields, dict(columns), header)


def split(examples: list[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """The examples, and a random share of them held out, both in their order; the same for the same seed."""
    held_out = round(len(examples) * share)
    if not 0 < held_out < len(examples):
        raise DataError(
            f"{examples[0].where.rpartition(':')[0]}: {len(examples)} examples are too few to hold out {share:.0%} of "
            "them; give --validation, or raise --validation-share"
        )
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = set(order[:held_out])
    return (
        [e for i, e in enumerate(examples) if i not in chosen],
        [e for i, e in enumerate(examples) if i in chosen],
    )

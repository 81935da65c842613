"""What a task is: the columns it reads, how examples become tensors, its loss, and how a model is judged at it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...data import Example, Field
from ..classification import Classification
from ..errors import ConfigError

IGNORED = -100  # label of what the loss passes over
LOGITS_AT_ONCE = 1 << 26  # elements of float32 logits that an evaluation of a language model holds: 256 MiB


@dataclass(frozen=True)
class TaskOptions:
    """Settings that tasks read; see FinetuneConfig."""

    max_length: int
    label_smoothing: float = 0.0
    class_weights: str | list[float] | None = None
    stride: int = 128
    beams: int = 1
    generate: bool = True
    max_new_tokens: int = 128
    prefix: str = ""
    pack: bool = True


@dataclass(frozen=True)
class Feature:
    """An example, or a part of one, as numbers; lists have an entry for each token and are padded."""

    inputs: dict[str, Any]  # lists of int, and numbers
    example: int  # its number among the examples it was made of
    extra: Any = None  # what judging needs

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])


@dataclass(frozen=True)
class Judgement:
    """How a model did: the loss (nats), figures by name (docs/finetuning.md says what they are), and details."""

    loss: float
    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)  # of what JSON can hold
    classification: Classification | None = None
    predictions: list[Any] = field(default_factory=list)  # one for each example

    def __str__(self) -> str:
        figures = "  ".join(f"{name} {value:.4f}" for name, value in self.metrics.items())
        return f"loss {self.loss:.4f}  {figures}"


class Task(ABC):
    """One kind of fine-tuning. A task has state: the labels it learned from the training examples."""

    name: ClassVar[str]
    auto: ClassVar[str]  # the class of transformers that loads a model with this head
    peft: ClassVar[str]  # peft's name of the task
    fields: ClassVar[tuple[Field, ...]]
    metric: ClassVar[str]  # what the best step is chosen by: "loss", or a figure of which more is better

    def __init__(self, tokenizer: Any, options: TaskOptions):
        self.tokenizer, self.options = tokenizer, options
        self.truncated = 0  # examples that were cut at max_length since the task was made

    def learn(self, examples: Sequence[Example], known: Mapping[int, str]) -> None:  # noqa: B027
        """Takes up what depends on the training examples, such as labels; `known` are those the model has."""

    def take_labels(self, known: Mapping[int, str]) -> None:  # noqa: B027
        """In place of `learn`, for a model that has been fine-tuned."""

    def model_options(self) -> dict[str, Any]:
        """What the model's config needs: number and names of the labels."""
        return {}

    @abstractmethod
    def encode(self, examples: Sequence[Example]) -> list[Feature]:
        """Examples as features; DataError, with file, line and column, for one that cannot be."""

    @abstractmethod
    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """The mean over the batch's targets, a scalar with a graph; called under autocast."""

    @abstractmethod
    def targets(self, batch: dict[str, Tensor]) -> int:
        """How many things `loss` averages over."""

    @abstractmethod
    def judge(
        self, model: Any, batches: Iterable[tuple[list[Feature], dict[str, Tensor]]], examples: Sequence[Example],
        *, final: bool = True,
    ) -> Judgement:  # fmt: skip
        """How the model, in evaluation mode and under autocast, does at `examples`; `final` adds what takes longer."""

    def collate(self, features: Sequence[Feature]) -> dict[str, Tensor]:
        """A batch: lists padded at the end to the longest, int64 [B, longest]; numbers as int64 [B]."""
        pads = {"input_ids": self.tokenizer.pad_token_id or 0, "labels": IGNORED}
        batch = {}
        for key, first in features[0].inputs.items():
            values = [f.inputs[key] for f in features]
            if isinstance(first, int):
                batch[key] = torch.tensor(values)
                continue
            longest = max(len(v) for v in values)
            batch[key] = torch.tensor([v + [pads.get(key, 0)] * (longest - len(v)) for v in values])
        return batch

    def encoded(self, *texts: Any, **how: Any) -> Any:
        """The tokenizer's encoding of texts (and pairs), cut at max_length."""
        how = {"truncation": True, "max_length": self.options.max_length, **how}
        return self.tokenizer(*texts, **how)

    def class_weights(self, counts: Tensor) -> Tensor | None:
        """Of the loss: None, those of the options, or "balanced": the inverse of a class's frequency, 1 on average."""
        weights = self.options.class_weights
        if weights is None:
            return None
        if weights == "balanced":
            return counts.sum() / (len(counts) * counts.clamp(min=1)).float()
        if len(weights) != len(counts):
            raise ConfigError(f"class_weights: {len(weights)} numbers for {len(counts)} classes")
        return torch.tensor(weights, dtype=torch.float32)

    def require_fast_tokenizer(self) -> None:
        if not self.tokenizer.is_fast:
            raise ConfigError(f"model: task {self.name} needs a fast tokenizer (tokenizer.json), this one has none")


def rows_at_once(batch: Mapping[str, Tensor], vocabulary: int) -> int:
    """Rows of a batch whose logits an evaluation may hold together."""
    length = batch["labels"].shape[1]
    return max(1, LOGITS_AT_ONCE // (length * vocabulary))


def inputs_of(batch: Mapping[str, Tensor], *without: str) -> dict[str, Tensor]:
    """A batch without its targets."""
    return {k: v for k, v in batch.items() if k not in ("labels", "start_positions", "end_positions", *without)}

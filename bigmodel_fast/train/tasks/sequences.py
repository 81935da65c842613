"""Classification of a text, or of a pair of texts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import Example, Field
from ...ops import cross_entropy
from ..classification import classify
from .base import Feature, Judgement, Task, inputs_of
from .labels import Labels


class Sequences(Task):
    """A class for each text."""

    name, auto, peft, metric = "classify", "AutoModelForSequenceClassification", "SEQ_CLS", "accuracy"
    fields = (
        Field("text", ("sentence", "sentence1", "review", "content", "premise", "question1", "question", "document")),
        Field("label", ("labels", "class", "category", "sentiment", "target", "gold_label")),
        Field("pair", ("text_pair", "text2", "sentence2", "hypothesis", "question2"), required=False),
    )
    labels: Labels
    _weights: Tensor | None

    def learn(self, examples: Sequence[Example], known: Mapping[int, str]) -> None:
        self.labels = Labels(((e.label("label"), e) for e in examples), known, "label")
        self._weights = self.class_weights(torch.tensor(self.labels.counts))

    def take_labels(self, known: Mapping[int, str]) -> None:
        self.labels, self._weights = Labels((), known, "label"), None

    def model_options(self) -> dict[str, Any]:
        return self.labels.model_options()

    def encode(self, examples: Sequence[Example]) -> list[Feature]:
        numbers = [self.labels.number(e.label("label"), e) for e in examples]
        texts = [e.text("text") for e in examples]
        pairs = [e.text("pair") for e in examples] if any(e.has("pair") for e in examples) else None
        encoded = self.encoded(texts, pairs)
        self.truncated += sum(len(ids) >= self.options.max_length for ids in encoded["input_ids"])
        return [
            Feature({**{key: encoded[key][i] for key in encoded}, "labels": number}, i)
            for i, number in enumerate(numbers)
        ]

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return self._loss(model(**inputs_of(batch)).logits, batch["labels"])

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.options.label_smoothing
        if self._weights is None:
            return cross_entropy(logits, labels, label_smoothing=smoothing)
        return F.cross_entropy(logits.float(), labels, self._weights.to(logits.device), label_smoothing=smoothing)

    def targets(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def judge(
        self, model: Any, batches: Iterable[tuple[list[Feature], dict[str, Tensor]]], examples: Sequence[Example],
        *, final: bool = True,
    ) -> Judgement:  # fmt: skip
        logits = torch.empty(len(examples), len(self.labels))
        labels = torch.empty(len(examples), dtype=torch.int64)
        loss = 0.0
        for features, batch in batches:
            numbers = [f.example for f in features]
            found = model(**inputs_of(batch)).logits.float()
            loss += self._loss(found, batch["labels"]).item() * len(numbers)
            logits[numbers], labels[numbers] = found.cpu(), batch["labels"].cpu()
        predicted = logits.argmax(1)
        report = classify(predicted, labels, tuple(self.labels.names))
        return Judgement(
            loss / len(examples),
            {
                "accuracy": report.accuracy,
                "precision": report.macro_precision,
                "recall": report.macro_recall,
                "f1": report.macro_f1,
                "mcc": report.mcc,
            },
            classification=report,
            predictions=[
                {"label": self.labels.names[i], "probability": p}
                for i, p in zip(predicted.tolist(), logits.softmax(1).max(1).values.tolist(), strict=True)
            ],
        )

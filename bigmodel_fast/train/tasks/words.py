"""Classification of each word: named entities, parts of speech."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import Example, Field
from ...ops import cross_entropy
from ..classification import classify
from .base import IGNORED, Feature, Judgement, Task, inputs_of
from .entities import entity_scores, has_entities
from .labels import Labels

OUTSIDE = "O"  # the tag of words that max_length cuts off


class Words(Task):
    """A tag for each word, read off its first token."""

    name, auto, peft, metric = "tokens", "AutoModelForTokenClassification", "TOKEN_CLS", "f1"
    fields = (Field("tokens", ("words", "text", "sentence")), Field("tags", ("labels", "ner_tags", "pos_tags", "ner")))
    labels: Labels
    _weights: Tensor | None

    def learn(self, examples: Sequence[Example], known: Mapping[int, str]) -> None:
        self.labels = Labels(((tag, e) for e in examples for tag in self._tags(e)), known, "tags")
        self._weights = self.class_weights(torch.tensor(self.labels.counts))

    def take_labels(self, known: Mapping[int, str]) -> None:
        self.labels, self._weights = Labels((), known, "tags"), None

    def model_options(self) -> dict[str, Any]:
        return self.labels.model_options()

    def _tags(self, example: Example) -> list[str]:
        words, tags = example.words("tokens"), example.words("tags")
        if len(words) != len(tags):
            raise example.error("tags", f"{len(tags)} tags for {len(words)} words")
        return tags

    def encode(self, examples: Sequence[Example]) -> list[Feature]:
        self.require_fast_tokenizer()
        tags = [[self.labels.number(tag, e) for tag in self._tags(e)] for e in examples]
        encoded = self.encoded([e.words("tokens") for e in examples], is_split_into_words=True)
        features = []
        for i in range(len(examples)):
            first, labels = set(), []
            for word in encoded.word_ids(i):
                labels.append(IGNORED if word is None or word in first else tags[i][word])
                first.add(word)
            self.truncated += len(first - {None}) < len(tags[i])
            features.append(Feature({**{key: encoded[key][i] for key in encoded}, "labels": labels}, i))
        return features

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return self._loss(model(**inputs_of(batch)).logits, batch["labels"])

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.options.label_smoothing
        if self._weights is None:
            return cross_entropy(logits, labels, label_smoothing=smoothing)
        weights = self._weights.to(logits.device)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), weights, label_smoothing=smoothing)

    def targets(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def judge(
        self, model: Any, batches: Iterable[tuple[list[Feature], dict[str, Tensor]]], examples: Sequence[Example],
        *, final: bool = True,
    ) -> Judgement:  # fmt: skip
        truth = [self._tags(e) for e in examples]
        names = self.labels.names
        predicted = [[OUTSIDE] * len(tags) for tags in truth]
        loss, words = 0.0, 0
        for features, batch in batches:
            logits = model(**inputs_of(batch)).logits.float()
            count = self.targets(batch)
            loss, words = loss + self._loss(logits, batch["labels"]).item() * count, words + count
            for feature, best in zip(features, logits.argmax(-1).cpu().tolist(), strict=True):
                labels = feature.inputs["labels"]
                found = [names[n] for n, label in zip(best, labels, strict=False) if label != IGNORED]
                predicted[feature.example][: len(found)] = found
        return self._judgement(loss / max(1, words), truth, predicted)

    def _judgement(self, loss: float, truth: list[list[str]], predicted: list[list[str]]) -> Judgement:
        names = [*self.labels.names, *([] if OUTSIDE in self.labels.names else [OUTSIDE])]
        numbers = {name: i for i, name in enumerate(names)}
        flat = [torch.tensor([numbers[tag] for tags in some for tag in tags]) for some in (predicted, truth)]
        report = classify(flat[0], flat[1], tuple(names))
        metrics = {"accuracy": report.accuracy}
        details: dict[str, Any] = {}
        if has_entities(names):
            (precision, recall, f1), kinds = entity_scores(truth, predicted)
            macro = sum(kind.f1 for kind in kinds) / max(1, len(kinds))
            metrics |= {"precision": precision, "recall": recall, "f1": f1, "macro_f1": macro}
            details["entities"] = [dataclasses.asdict(kind) for kind in kinds]
        else:
            metrics |= {"precision": report.macro_precision, "recall": report.macro_recall, "f1": report.macro_f1}
            metrics["mcc"] = report.mcc
        return Judgement(loss, metrics, details, report, predictions=predicted)

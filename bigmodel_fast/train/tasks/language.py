"""Language models: texts continued (causal) and texts translated or summarised (seq2seq)."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...data import Example, Field
from .base import IGNORED, Feature, Judgement, Task, inputs_of, rows_at_once


class _Language(Task):
    """The loss of both: the model's own, over the tokens that have a label."""

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss

    def _measure(self, model: Any, batches: Iterable[tuple[list[Feature], dict[str, Tensor]]], shift: int) -> Judgement:
        """Loss, perplexity and the share of tokens that are the likeliest one, a few rows at a time."""
        loss = right = count = 0.0
        for _, batch in batches:
            rows = rows_at_once(batch, model.config.vocab_size)
            for start in range(0, len(batch["labels"]), rows):
                part = {k: v[start : start + rows] for k, v in batch.items()}
                labels = part["labels"][:, shift:].flatten()
                logits = self._logits(model, part)
                logits = logits[:, : logits.shape[1] - shift].flatten(0, 1).float()
                loss += F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
                right += float((logits.argmax(1) == labels).sum())
                count += float((labels != IGNORED).sum())
        mean = loss / max(1.0, count)
        return Judgement(mean, {"perplexity": math.exp(min(mean, 700.0)), "token_accuracy": right / max(1.0, count)})

    def _logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return model(**inputs_of(batch)).logits


class Causal(_Language):
    """Texts are joined, an end of text after each, and cut into pieces of max_length; or a prompt and its completion,
    of which the completion counts."""

    name, auto, peft, metric = "causal", "AutoModelForCausalLM", "CAUSAL_LM", "loss"
    fields = (
        Field("text", ("content", "document"), required=False),
        Field("prompt", ("instruction", "question", "input"), required=False),
        Field("completion", ("response", "answer", "output"), required=False),
    )

    def encode(self, examples: Sequence[Example]) -> list[Feature]:
        texts, features = [], []
        for i, e in enumerate(examples):
            if {"prompt", "completion"} <= e.columns.keys():
                prompt, completion = self._ids(e.text("prompt")), self._tokens(e.text("completion"))
                features.append(self._feature(prompt + completion, [IGNORED] * len(prompt) + completion, i))
            elif "text" in e.columns:
                texts.append((i, self._tokens(e.text("text"))))
            else:
                raise e.error("text", "there is none, nor prompt and completion; tell it by --columns.text NAME")
        features += self._packed(texts) if self.options.pack else [self._feature(t, t, i) for i, t in texts]
        return [f for f in features if any(label != IGNORED for label in f.inputs["labels"][1:])]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _tokens(self, text: str) -> list[int]:
        end = self.tokenizer.eos_token_id
        return [*self._ids(text), *([] if end is None else [end])]

    def _feature(self, tokens: list[int], labels: list[int], example: int) -> Feature:
        most = self.options.max_length
        self.truncated += len(tokens) > most
        return Feature(
            {"input_ids": tokens[:most], "attention_mask": [1] * len(tokens[:most]), "labels": labels[:most]}, example
        )

    def _packed(self, texts: list[tuple[int, list[int]]]) -> list[Feature]:
        stream = [token for _, tokens in texts for token in tokens]
        most = self.options.max_length
        pieces = [stream[start : start + most] for start in range(0, len(stream), most)]
        return [self._feature(piece, piece, 0) for piece in pieces]

    def targets(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def judge(
        self, model: Any, batches: Iterable[tuple[list[Feature], dict[str, Tensor]]], examples: Sequence[Example],
        *, final: bool = True,
    ) -> Judgement:  # fmt: skip
        return self._measure(model, batches, shift=1)


class Seq2Seq(_Language):
    """A target text for a source text."""

    name, auto, peft, metric = "seq2seq", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "loss"
    fields = (
        Field("source", ("src", "input", "text", "article", "document")),
        Field("target", ("tgt", "output", "summary", "translation", "label")),
    )

    def encode(self, examples: Sequence[Example]) -> list[Feature]:
        sources = self.encoded([self.options.prefix + e.text("source") for e in examples])
        targets = self.encoded(text_target=[e.text("target") for e in examples])
        both = [*sources["input_ids"], *targets["input_ids"]]
        self.truncated += sum(len(ids) >= self.options.max_length for ids in both)
        return [
            Feature({"input_ids": sources["input_ids"][i], "attention_mask": sources["attention_mask"][i]}
                    | {"labels": targets["input_ids"][i]}, i)
            for i in range(len(examples))
        ]  # fmt: skip

    def targets(self, batch: dict[str, Tensor]) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def _logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).logits  # labels too: they become the decoder's input

    def judge(
        self, model: Any, batches: Iterable[tuple[list[Feature], dict[str, Tensor]]], examples: Sequence[Example],
        *, final: bool = True,
    ) -> Judgement:  # fmt: skip
        kept = list(batches)
        judgement = self._measure(model, kept, shift=0)
        if not (final and self.options.generate):
            return judgement
        said = [""] * len(examples)
        for features, batch in kept:
            with torch.inference_mode():
                tokens = model.generate(
                    **inputs_of(batch), num_beams=self.options.beams, max_new_tokens=self.options.max_new_tokens,
                    do_sample=False,
                )  # fmt: skip
            texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for feature, text in zip(features, texts, strict=True):
                said[feature.example] = text.strip()
        bleu, signature = bleu_of(said, [e.text("target") for e in examples])
        return Judgement(
            judgement.loss, {**judgement.metrics, "bleu": bleu}, {"bleu_signature": signature}, predictions=said
        )


def bleu_of(said: list[str], right: list[str]) -> tuple[float, str]:
    """BLEU of a corpus, 0 to 100, and sacrebleu's signature of how it was counted (Post 2018)."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    return metric.corpus_score(said, [right]).score, str(metric.get_signature())

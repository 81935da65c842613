"""Extractive question answering: the part of a context that answers a question (Rajpurkar et al. 2016)."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...data import Example, Field
from ...ops import cross_entropy
from .base import Feature, Judgement, Task, inputs_of

LONGEST_ANSWER = 30  # tokens


class Questions(Task):
    """Start and end of the answer. A context longer than a window is read in windows that overlap by `stride` tokens.

    An example without an answer points at the first token, in each of its windows (SQuAD 2).
    """

    name, auto, peft, metric = "qa", "AutoModelForQuestionAnswering", "QUESTION_ANS", "f1"
    fields = (
        Field("question", ("query",)),
        Field("context", ("passage", "paragraph")),
        Field("answers", ("answer",)),
        Field("answer_start", ("start",), required=False),
    )

    def encode(self, examples: Sequence[Example]) -> list[Feature]:
        self.require_fast_tokenizer()
        answers = [answers_of(e) for e in examples]
        how = {"truncation": "only_second", "stride": min(self.options.stride, self.options.max_length // 4)}
        texts = [e.text("question") for e in examples], [e.text("context") for e in examples]
        try:
            encoded = self.encoded(*texts, **how, return_overflowing_tokens=True, return_offsets_mapping=True)
        except Exception as error:  # the tokenizers library raises nothing more special for a question without room
            longest = max(examples, key=lambda e: len(e.text("question")))
            raise longest.error("question", f"too long for max_length {self.options.max_length} ({error})") from None
        features = []
        for i, number in enumerate(encoded["overflow_to_sample_mapping"]):
            spans = [
                place if part == 1 else None
                for place, part in zip(encoded["offset_mapping"][i], encoded.sequence_ids(i), strict=True)
            ]
            start, end = _tokens_of(answers[number][0] if answers[number] else None, spans)
            inputs = {
                k: v[i] for k, v in encoded.items() if k not in ("offset_mapping", "overflow_to_sample_mapping")
            } | {"start_positions": start, "end_positions": end}
            features.append(Feature(inputs, number, spans))
        self.truncated += len(features) - len(examples)
        return features

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        out = model(**inputs_of(batch))
        return self._loss(out.start_logits, out.end_logits, batch)

    def _loss(self, start: Tensor, end: Tensor, batch: dict[str, Tensor]) -> Tensor:
        smoothing = self.options.label_smoothing
        both = torch.cat([start, end]), torch.cat([batch["start_positions"], batch["end_positions"]])
        return cross_entropy(*both, label_smoothing=smoothing)

    def targets(self, batch: dict[str, Tensor]) -> int:
        return len(batch["start_positions"])

    def judge(
        self, model: Any, batches: Iterable[tuple[list[Feature], dict[str, Tensor]]], examples: Sequence[Example],
        *, final: bool = True,
    ) -> Judgement:  # fmt: skip
        best: dict[int, tuple[float, str]] = {}
        loss, count = 0.0, 0
        for features, batch in batches:
            out = model(**inputs_of(batch))
            starts, ends = out.start_logits.float(), out.end_logits.float()
            loss, count = loss + self._loss(starts, ends, batch).item() * len(features), count + len(features)
            for feature, start, end in zip(features, starts.cpu(), ends.cpu(), strict=True):
                score, answer = _best_answer(start, end, feature.extra, examples[feature.example].text("context"))
                if score > best.get(feature.example, (-float("inf"), ""))[0]:
                    best[feature.example] = score, answer
        said = [best[i][1] for i in range(len(examples))]
        exact = overlap = 0.0
        for example, answer in zip(examples, said, strict=True):
            right = [text for _, text in answers_of(example)] or [""]
            exact += max(float(normalised(answer) == normalised(r)) for r in right)
            overlap += max(f1_of_words(answer, r) for r in right)
        n = len(examples)
        return Judgement(loss / count, {"exact_match": exact / n, "f1": overlap / n}, predictions=said)


def answers_of(example: Example) -> list[tuple[int, str]]:
    """(first character, text) of each answer; none if there is none in the context.

    Column answers holds a text (its place in answer_start, else its first occurrence), a list of texts, or SQuAD's
    {"text": [...], "answer_start": [...]}.
    """
    context = example.text("context")
    value: Any = example.values["answers"]
    starts: Any = []
    if isinstance(value, dict):
        value, starts = value.get("text"), value.get("answer_start") or []
    texts = [value] if isinstance(value, str) else value
    if example.has("answer_start") and len(texts or ()) == 1:
        starts = [example.whole("answer_start")]
    if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts) or not isinstance(starts, list):
        raise example.error("answers", "expected a text, a list of texts, or an object of text and answer_start")
    found = []
    for text, start in zip(texts, starts or [None] * len(texts), strict=False):
        if not text:
            continue
        place = context.find(text) if start is None else start
        if not isinstance(place, int) or place < 0 or context[place : place + len(text)] != text:
            at = "in the context" if start is None else f"at character {start} of the context"
            raise example.error("answers", f"the answer does not stand {at}")
        found.append((place, text))
    return found


def _tokens_of(answer: tuple[int, str] | None, spans: list[tuple[int, int] | None]) -> tuple[int, int]:
    """First and last token of an answer in a window; (0, 0) if it is not all there."""
    if answer is None:
        return 0, 0
    begin, end = answer[0], answer[0] + len(answer[1])
    inside = [i for i, place in enumerate(spans) if place and place[1] > begin and place[0] < end]
    if not inside or spans[inside[0]][0] > begin or spans[inside[-1]][1] < end:  # type: ignore[index]
        return 0, 0
    return inside[0], inside[-1]


def _best_answer(start: Tensor, end: Tensor, spans: list[tuple[int, int] | None], context: str) -> tuple[float, str]:
    """Score, above that of no answer, and text of the likeliest span [S]; padding lies beyond the spans."""
    n = len(spans)
    outside = torch.tensor([place is None for place in spans])
    scores = start[:n].masked_fill(outside, -float("inf"))[:, None] + end[:n].masked_fill(outside, -float("inf"))
    allowed = torch.ones(n, n, dtype=torch.bool).triu().tril(LONGEST_ANSWER - 1)
    scores = scores.masked_fill(~allowed, -float("inf"))
    i, j = divmod(int(scores.argmax()), n)
    gain = float(scores[i, j] - (start[0] + end[0]))
    if gain <= 0 or spans[i] is None or spans[j] is None:
        return 0.0, ""
    return gain, context[spans[i][0] : spans[j][1]]  # type: ignore[index]


def normalised(text: str) -> list[str]:
    """Words in lower case, without punctuation and English articles, as SQuAD's evaluation has it."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1_of_words(said: str, right: str) -> float:
    """F1 of the words two answers share."""
    ours, theirs = normalised(said), normalised(right)
    if not ours or not theirs:
        return float(ours == theirs)
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs))

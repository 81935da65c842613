"""Which words a classifier went by: integrated gradients (Sundararajan et al. 2017) by captum, as one HTML page.

The attribution of a word is its share of how much higher the class's logit is for the text than for one of padding
tokens alone; the shares of all words and of the special tokens add up to that difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data import Example
from .attribution_page import page
from .tasks import Feature, Judgement, Task


@dataclass(frozen=True)
class Word:
    """A piece of text and its attribution; None for what lies between words."""

    text: str
    share: float | None


@dataclass(frozen=True)
class Explanation:
    """One example explained."""

    where: str
    label: str
    predicted: str
    probability: float
    words: tuple[Word, ...]
    special: float  # attribution of tokens that are no text, such as [CLS]
    total: float  # how much higher the predicted class's logit is for the text
    gap: float  # what numerical integration leaves unexplained of it


def write_attributions(
    model: Any, task: Task, features: Sequence[Feature], examples: Sequence[Example], judgement: Judgement,
    config: Any, device: torch.device, path: Path,
) -> list[Explanation]:  # fmt: skip
    """Explains `config.attributions` examples, the surest mistakes first, and writes the page.

    Args:
        model: a classifier of transformers, not accelerated: gradients go to its word embeddings.
        config: the EvaluateConfig.
    """
    said = judgement.predictions
    wrong = [e.label("label") != s["label"] for e, s in zip(examples, said, strict=True)]
    order = sorted(range(len(examples)), key=lambda i: (not wrong[i], -said[i]["probability"]))
    chosen = order[: config.attributions]
    explained = [
        explain(model, task, features[i], examples[i], said[i], config.attribution_steps, config.batch, device)
        for i in chosen
    ]
    path.write_text(page(explained, judgement.metrics, str(config.model), len(examples)), encoding="utf-8")
    return explained


def explain(
    model: Any, task: Task, feature: Feature, example: Example, said: dict[str, Any], steps: int, batch: int,
    device: torch.device,
) -> Explanation:  # fmt: skip
    """One example's words and their share in the logit of the class that the model chose."""
    from captum.attr import LayerIntegratedGradients

    model.eval()
    inputs = {key: tensor.to(device) for key, tensor in task.collate([feature]).items() if key != "labels"}
    ids = inputs.pop("input_ids")
    special = torch.tensor([t in task.tokenizer.all_special_ids for t in ids[0].tolist()], device=device)
    baseline = torch.where(special, ids, task.tokenizer.pad_token_id or 0)
    target = task.labels.names.index(said["label"])  # type: ignore[attr-defined]
    names = list(inputs)

    def logits(tokens: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return model(input_ids=tokens, **dict(zip(names, others, strict=True))).logits

    with torch.no_grad():
        total = float((logits(ids, *inputs.values()) - logits(baseline, *inputs.values()))[0, target])
    gradients = LayerIntegratedGradients(logits, model.get_input_embeddings())
    shares = gradients.attribute(
        ids, baselines=baseline, additional_forward_args=tuple(inputs.values()), target=target, n_steps=steps,
        internal_batch_size=batch,
    )[0].sum(-1).detach().cpu()  # fmt: skip
    return Explanation(
        where=example.where,
        label=example.label("label"),
        predicted=said["label"],
        probability=said["probability"],
        words=tuple(_words(task, example, shares)),
        special=float(shares[special.cpu()].sum()),
        total=total,
        gap=total - float(shares.sum()),
    )


def _words(task: Task, example: Example, shares: torch.Tensor) -> list[Word]:
    """The text cut at words, with the shares of each word's tokens added up; a pair's second text after a line end."""
    texts = [example.text(name) for name in ("text", "pair") if example.has(name)]
    if not task.tokenizer.is_fast:
        tokens = task.encoded(*texts)["input_ids"]
        names = task.tokenizer.convert_ids_to_tokens(tokens)
        return [Word(f"{n} ", float(s)) for n, s, t in zip(names, shares, tokens, strict=True)
                if t not in task.tokenizer.all_special_ids]  # fmt: skip
    encoded = task.encoded(*texts, return_offsets_mapping=True)
    words: list[Word] = []
    for number, text in enumerate(texts):
        places: dict[int, tuple[int, int, float]] = {}
        for i, (word, part) in enumerate(zip(encoded.word_ids(), encoded.sequence_ids(), strict=True)):
            if word is not None and part == number:
                begin, end = encoded["offset_mapping"][i]
                start, _, share = places.get(word, (begin, end, 0.0))
                places[word] = start, end, share + float(shares[i])
        words += [Word("\n", None)] if number else []
        done = 0
        for start, end, share in places.values():
            words += [Word(text[done:start], None)] if start > done else []
            words.append(Word(text[start:end], share))
            done = max(done, end)
        words += [Word(text[done:], None)] if done < len(text) else []
    return words

"""Lines of text through a Transformer that a run has trained."""

import itertools
from collections.abc import Iterable, Iterator

import torch

from ..data import DataError, Tokenizer
from ..models import Transformer, pack, translate

SENTENCES = 64  # translated at once


def translate_lines(
    model: Transformer,
    tokenizer: Tokenizer,
    lines: Iterable[str],
    *,
    beams: int = 4,
    length_penalty: float = 0.6,
    max_new_tokens: int | None = None,
) -> Iterator[str]:
    """A translation of each line, in their order, some at a time; an empty one of an empty line.

    Args:
        model: in evaluation mode. Its device is where the work is done.
        beams, length_penalty, max_new_tokens: see models.translate.

    Raises:
        DataError: a line is longer than the model's context; those before it have been given.
    """
    device = next(model.parameters()).device
    numbered = enumerate((line.strip() for line in lines), 1)
    while part := list(itertools.islice(numbered, SENTENCES)):
        sources = {number: [*tokenizer.encode(line), tokenizer.end] for number, line in part if line}
        for number, tokens in sources.items():
            if len(tokens) > model.config.context:
                raise DataError(
                    f"line {number}: has {len(tokens)} tokens, more than the context of {model.config.context}"
                )
        source, starts = pack(list(sources.values()), device)
        with torch.no_grad():
            found = translate(
                model,
                source,
                starts,
                end=tokenizer.end,
                beams=beams,
                length_penalty=length_penalty,
                max_new_tokens=max_new_tokens,
            )
        texts = {number: tokenizer.decode(t.tokens) for number, t in zip(sources, found, strict=True)}
        yield from (texts.get(number, "") for number, _ in part)

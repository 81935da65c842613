"""Translation with a Transformer: beam search over cached keys and values; one beam is greedy search."""

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .. import ops
from .._packed_weights import packed_weights
from ..nn import parts
from .layers import DecoderLayer
from .transformer import Transformer

EXTRA_TOKENS = 50  # that a translation may be longer than its source (Vaswani et al. 2017, section 6.1)


@dataclass(frozen=True)
class Translation:
    """Tokens, without the end, and their score: log-probability over the length penalty."""

    tokens: list[int]
    score: float


class _Decoding:
    """Translations under way: keys and values of each layer, for so many rows of each source sentence.

    Rows of one sentence are neighbours, and are queries of one sequence to that sentence's keys: nothing of the
    encoder's is repeated for beams, and a sentence that is done has no rows.
    """

    def __init__(self, model: Transformer, source: Tensor, starts: Tensor, rows: int, capacity: int):
        self.model, self.memory_starts, self.length = model, starts, 0
        self.layers = cast(list[DecoderLayer], list(model.decoder.layers))
        memory = model.encode(source, starts)
        self.memory = [layer.multihead_attn.keys_values(memory) for layer in self.layers]
        sentences = len(starts) - 1
        self.rows_of = torch.full((sentences,), rows, device=source.device)
        keys, _ = self.memory[0]
        shape = (sentences * rows, capacity, *keys.shape[1:])
        self.cache = [(keys.new_empty(shape), keys.new_empty(shape)) for _ in self.layers]

    def log_probabilities(self, tokens: Tensor) -> Tensor:
        """Of what follows after one more token in each row, [rows] to [rows, vocab_size] in float32."""
        model = self.model
        x = model.embed_at(tokens, model.table[self.length])
        starts = torch.nn.functional.pad(self.rows_of.cumsum(0), (1, 0)).to(torch.int32)
        for layer, cache, memory in zip(self.layers, self.cache, self.memory, strict=True):
            x = layer.step(x, cache, self.length, starts, memory, self.memory_starts)
        self.length += 1
        weight = parts.tied(model.embedding, model.config.vocab_size, x.device)
        return ops.linear(model.decoder.norm(x), weight).float().log_softmax(-1)

    def keep(self, rows: Tensor, done: Tensor) -> None:
        """Goes on with these rows, in this order; `done`: numbers of the sentences that have none of them."""
        self.rows_of[done] = 0
        for pair in self.cache:
            for t in pair:
                t[: len(rows), : self.length] = t[rows, : self.length]
        self.cache = [(keys[: len(rows)], values[: len(rows)]) for keys, values in self.cache]


@torch.no_grad()
def translate(
    model: Transformer,
    source: Tensor,
    starts: Tensor,
    *,
    end: int,
    beams: int = 4,
    length_penalty: float = 0.6,
    max_new_tokens: int | None = None,
) -> list[Translation]:
    """The best translation found of each source sequence; it does not depend on the others of the batch.

    A sequence scores log P / ((5 + length) / 6)^length_penalty, its end counted in the length (Wu et al. 2016). Search
    ends with as many finished translations as beams, or when none under way can score better than the best of them.

    Args:
        source: [tokens], int64, sequences one after the other.
        starts: [sequences + 1], int32, where each begins (see `pack`).
        end: the token that ends a sequence; a target begins with it too.
        beams: sequences kept at each length; 1 is greedy search.
        length_penalty: 0 or more; more favours longer ones.
        max_new_tokens: most tokens of a translation. None: 50 more than its source; never more than the context.

    Raises:
        ValueError: an option is out of range.
    """
    if beams < 1:
        raise ValueError(f"translate: beams must be 1 or more, got {beams}")
    if not length_penalty >= 0:
        raise ValueError(f"translate: length_penalty must be 0 or more, got {length_penalty}")
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"translate: max_new_tokens must be 1 or more, got {max_new_tokens}")
    device, context = source.device, model.config.context
    lengths = starts.to(torch.int64).diff()
    limits = torch.full_like(lengths, context if max_new_tokens is None else min(max_new_tokens, context))
    if max_new_tokens is None:
        limits = torch.minimum(limits, lengths + EXTRA_TOKENS)
    found = [Translation([], -torch.inf)] * len(lengths)
    if not len(lengths):
        return found

    def penalty(length: int | Tensor) -> float | Tensor:
        return ((5 + length) / 6) ** length_penalty

    with packed_weights(model.parameters()):
        decoding = _Decoding(model, source, starts, beams, int(limits.max()))
        active = torch.arange(len(lengths), device=device)  # sentences that are not done
        tokens = torch.full((len(active) * beams,), end, device=device)
        history = tokens.new_empty(len(tokens), 0)
        score = torch.full((len(active), beams), -torch.inf, device=device)
        score[:, 0] = 0.0  # the beams are equal at first: one is enough
        finished = torch.zeros_like(active)
        best = torch.full((len(active),), -torch.inf, device=device)
        for length in range(1, int(limits.max()) + 1):
            log_p = decoding.log_probabilities(tokens)
            vocab = log_p.shape[1]
            total = (score[:, :, None] + log_p.view(len(active), beams, vocab)).flatten(1)
            # Twice as many as beams: as many go on even if each beam's likeliest is its end.
            top, index = torch.nn.functional.pad(total, (0, max(0, 2 * beams - total.shape[1])), value=-torch.inf).topk(
                2 * beams
            )
            index = index.clamp(max=total.shape[1] - 1)
            beam, token = index // vocab, index % vocab
            last = limits[active] == length
            ended = token == end
            finishes = (ended | last[:, None]) & top.isfinite()
            finishes[:, beams:] = False
            value, which = torch.where(finishes, top / penalty(length), -torch.inf).max(1)
            first_row = torch.arange(len(active), device=device)[:, None] * beams
            for i in (value > best).nonzero()[:, 0].tolist():
                j = int(which[i])
                text = history[int(first_row[i]) + int(beam[i, j])].tolist()
                found[int(active[i])] = Translation(text + [int(token[i, j])] * (not ended[i, j]), float(value[i]))
            best = torch.maximum(best, value)
            finished += finishes.sum(1)
            score, go_on = torch.where(ended, -torch.inf, top).topk(beams)
            beam, token = beam.gather(1, go_on), token.gather(1, go_on)
            done = last | (finished >= beams) | (best >= score[:, 0] / penalty(limits[active]))
            rows = (first_row + beam)[~done].flatten()
            decoding.keep(rows, active[done])
            tokens = token[~done].flatten()
            history = torch.cat([history[rows], tokens[:, None]], 1)
            active, score, finished, best = (t[~done] for t in (active, score, finished, best))
            if not len(active):
                break
    return found

"""Sequence to sequence: an encoder and decoder learns to translate from pairs of sentences."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...data import PairBatches, Pairs, prepare_pairs
from ...models import Transformer
from ..config import TrainConfig
from .base import Batch, Objective, Progress
from .text import fingerprint, unusable


class Seq2Seq(Objective):
    """Batches are those of data.PairBatches: packed pairs, and the batch's share of its step's labels."""

    model_name = "Transformer"

    def __init__(self, config: TrainConfig, progress: Progress):
        super().__init__(config)
        try:
            files = prepare_pairs(
                Path(config.data) if config.data else None,
                config.cache_folder / "pairs",
                languages=config.seq2seq.languages,
                tokenizer=config.tokenizer,
                vocab_size=config.vocab_size,
                progress=progress,
            )
        except OSError as error:
            raise unusable(config, error) from None
        o, context, end = config.optim, config.model.context, files.tokenizer.end
        self.tokenizer, self.train = files.tokenizer, files.train
        self.batches = PairBatches(files.train, end, o.batch, o.accumulation, context=context, seed=config.seed)
        rows = min(o.batch, len(files.validation))
        self.validation_pairs = PairBatches(files.validation, end, rows, context=context, what="validation")
        splits = {"train": files.train, "validation": files.validation}
        sides = {f"{name}_{side}": getattr(s, side) for name, s in splits.items() for side in ("source", "target")}
        self.corpus = fingerprint(files.tokenizer.vocab_size, sides)
        self.train_tokens, self.validation_tokens = (_tokens(s) for s in splits.values())
        self.tokens_per_step = round(o.batch * o.accumulation * self.train_tokens / len(files.train))

    def build(self) -> Transformer:
        return Transformer(self.config.model.of("seq2seq", self.tokenizer.vocab_size))

    def loss(self, model: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        """Smoothed where a gradient is wanted; a model is measured without."""
        smoothing = self.config.seq2seq.label_smoothing if torch.is_grad_enabled() else 0.0
        return model(*batch[:5], label_smoothing=smoothing)

    def targets(self, *batch: Tensor) -> Tensor:
        return batch[4]

    def validation(self) -> list[Batch]:
        return self.validation_pairs.spread(self.config.eval_sequences)

    def tokens(self, *batch: Tensor) -> int:
        return batch[0].numel() + batch[2].numel()

    def share(self, *batch: Tensor) -> Tensor:
        return batch[5]

    def part(self, rank: int, ranks: int, *batch: Tensor) -> Batch:
        """Every so many-th pair, for they are sorted by length."""
        source, source_starts, target, target_starts, labels, share = batch
        chosen = range(rank, len(source_starts) - 1, ranks)
        mine = [_pick(t, s, chosen) for t, s in ((source, source_starts), (target, target_starts))]
        return *mine[0], *mine[1], _pick(labels, target_starts, chosen)[0], share

    def flops_per_token(self, model: nn.Module) -> float:
        assert isinstance(model, Transformer)
        source, target = (float(np.mean(n)) for n in (self.train.source_lengths, self.train.target_lengths))
        return model.flops(source, target, source, target) / (source + target)


def _tokens(pairs: Pairs) -> int:
    return len(pairs.source) + len(pairs.target)


def _pick(tokens: Tensor, starts: Tensor, chosen: range) -> tuple[Tensor, Tensor]:
    """Some of the sentences that lie one after the other: their tokens, and where each begins."""
    parts = [tokens[starts[i] : starts[i + 1]] for i in chosen]
    begins = torch.tensor([0, *(len(part) for part in parts)], dtype=starts.dtype).cumsum(0, dtype=starts.dtype)
    return torch.cat(parts), begins

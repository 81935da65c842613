"""Batches of token windows in a shuffled order that can be left and taken up again."""

import numpy as np
import torch
from torch import Tensor

from .corpus import DataError


class Batches:
    """Endless batches (tokens, targets) of windows of a token array: [batch, context] int64 each, targets one ahead.

    An epoch takes every window once, in an order drawn from the seed and the epoch; each epoch starts at another
    offset, so that windows are cut differently. `state_dict` is the position.
    """

    def __init__(self, tokens: np.ndarray, batch: int, context: int, seed: int = 0, what: str = "the training text"):
        if len(tokens) < batch * context + 1:
            raise DataError(
                f"{what} has {len(tokens)} tokens, less than one batch of {batch} x {context} + 1; "
                "give more text with --data, or lower the batch or the context"
            )
        self.tokens, self.batch, self.context, self.seed = tokens, batch, context, seed
        self.epoch, self.position = 0, 0
        self._start_epoch()

    def _start_epoch(self) -> None:
        draw = np.random.default_rng([self.seed, self.epoch])
        spare = len(self.tokens) - 1 - self.batch * self.context
        self._offset = int(draw.integers(min(self.context - 1, spare) + 1)) if self.epoch else 0
        self._order = draw.permutation((len(self.tokens) - 1 - self._offset) // self.context)

    def next(self) -> tuple[Tensor, Tensor]:
        if self.position + self.batch > len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._start_epoch()
        starts = self._order[self.position : self.position + self.batch] * self.context + self._offset
        self.position += self.batch
        return self._windows(starts)

    def spread(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """`count` batches (fewer if there are not so many) of windows spread evenly over the text; moves nothing."""
        windows = (len(self.tokens) - 1) // self.context
        count = min(count, windows // self.batch)
        chosen = np.arange(count * self.batch) * windows // (count * self.batch)
        return [self._windows(part) for part in np.split(chosen * self.context, count)]

    def _windows(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        rows = np.stack([self.tokens[s : s + self.context + 1] for s in starts]).astype(np.int64)
        both = torch.from_numpy(rows)
        return both[:, :-1], both[:, 1:]

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.epoch, self.position = (int(state[k]) for k in ("seed", "epoch", "position"))
        self._start_epoch()

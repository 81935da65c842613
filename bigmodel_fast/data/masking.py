"""Masked tokens: which are to be predicted, and what stands in their place (Devlin et al. 2019)."""

import numpy as np
import torch
from torch import Tensor

from .loader import Batches
from .tokenizer import Tokenizer

NO_TARGET = -100
MASKED, RANDOM = 0.8, 0.1  # shares that become the mask token and any token; the others stay as they are
_STREAM = 1  # tells these draws from those of the order of the data, which has the same seed


class Masking:
    """Makes sequences to learn from out of windows of a corpus. Which tokens it masks depends on a key alone.

    Each sequence begins with the end of a document, as a text does; that token is never masked. The mask token is the
    one behind the tokenizer's: models of masked text have a vocabulary of one more.

    Args:
        share: of a sequence's tokens that are to be predicted, in (0, 1).
        whole_words: mask all tokens of a word or none (words are runs of letters, digits and _).
    """

    def __init__(self, tokenizer: Tokenizer, window: int, share: float, whole_words: bool, seed: int):
        self.end, self.mask = tokenizer.end, tokenizer.vocab_size
        self.vocab_size = tokenizer.vocab_size + 1
        self.count = max(1, round(share * window))
        self.whole_words, self.seed = whole_words, seed
        if whole_words:
            texts = [tokenizer.bytes_of([token]) for token in range(tokenizer.vocab_size)]
            self._begins = np.array([bool(t) and _of_a_word(t[0]) for t in texts])
            self._ends = np.array([bool(t) and _of_a_word(t[-1]) for t in texts])

    def sequence(self, window: np.ndarray, key: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What stands there, which positions are to be predicted, and what belongs there.

        Args:
            window: [n] tokens of the corpus.

        Returns:
            [n + 1], [count], [count], int64. Where fewer than `count` can be masked, the last targets are -100.
        """
        draw = np.random.default_rng([self.seed, _STREAM, *key])
        tokens = np.concatenate([[self.end], window]).astype(np.int64)
        order = draw.permutation(len(tokens))
        chosen = self._whole(tokens, order) if self.whole_words else order[tokens[order] != self.end][: self.count]
        positions = np.zeros(self.count, np.int64)
        targets = np.full(self.count, NO_TARGET)
        positions[: len(chosen)], targets[: len(chosen)] = chosen, tokens[chosen]
        kind, other = draw.random(len(chosen)), draw.integers(self.mask, size=len(chosen))
        tokens[chosen] = np.where(kind < MASKED, self.mask, np.where(kind < MASKED + RANDOM, other, tokens[chosen]))
        return tokens, positions, targets

    def _whole(self, tokens: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Positions of words, taken in the order in which theirs come up, as long as they fit into `count`."""
        starts = np.ones(len(tokens), bool)
        starts[1:] = ~(self._begins[tokens[1:]] & self._ends[tokens[:-1]])
        word = starts.cumsum() - 1
        size = np.bincount(word)
        first = np.flatnonzero(starts)
        chosen: list[int] = []
        for w in dict.fromkeys(word[order[tokens[order] != self.end]].tolist()):
            if len(chosen) + size[w] <= self.count:
                chosen += range(first[w], first[w] + size[w])
            if len(chosen) == self.count:
                break
        return np.array(chosen, np.int64)

    def batch(self, windows: Tensor, keys: list[tuple[int, ...]]) -> tuple[Tensor, Tensor, Tensor]:
        """Of windows [B, n]: tokens [B, n + 1], positions and targets [B, count]."""
        rows = [self.sequence(row.numpy(), key) for row, key in zip(windows, keys, strict=True)]
        tokens, positions, targets = (torch.from_numpy(np.stack(parts)) for parts in zip(*rows, strict=True))
        return tokens, positions, targets


def _of_a_word(byte: int) -> bool:
    """Letters, digits, _, and the bytes of characters beyond ASCII."""
    return byte >= 0x80 or chr(byte).isalnum() or byte == ord("_")


class MaskedBatches:
    """Batches of a corpus with other tokens masked in each epoch, by its place in it: (tokens, positions, targets)."""

    def __init__(self, windows: Batches, masking: Masking):
        self.windows, self.masking = windows, masking

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        rows, _ = self.windows.next()
        after = self.windows.position
        return self.masking.batch(rows, [(self.windows.epoch, i) for i in range(after - len(rows), after)])

    def spread(self, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """As Batches.spread; the same tokens are masked each time."""
        batches = [rows for rows, _ in self.windows.spread(count)]
        return [self.masking.batch(rows, [(b, i) for i in range(len(rows))]) for b, rows in enumerate(batches)]

    def state_dict(self) -> dict[str, int]:
        return self.windows.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.windows.load_state_dict(state)

"""Batches of examples of similar length, so that little is padding."""

from collections.abc import Sequence

import torch

POOL = 64  # batches' worth of examples that are sorted by length together


class Buckets:
    """An endless sequence of batches, as lists of example numbers; each example comes once an epoch.

    The examples of an epoch are shuffled, sorted by length within pools of 64 batches, and cut; the order of the
    batches is random again. Everything follows from the seed and the epoch, so `state_dict` is a position.

    Args:
        lengths: tokens of each example.
        batch: examples in a batch; the last ones of an epoch may be fewer.
        seed: another seed gives another order.
        bucketed: False: no sorting, a plain shuffle.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int = 0, bucketed: bool = True):
        self.lengths = torch.tensor(lengths)
        self.batch, self.seed, self.bucketed = batch, seed, bucketed
        self.epoch, self.position = 0, 0
        self._order = self._shuffled()

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.lengths) // self.batch)

    def next(self) -> list[int]:
        if self.position == len(self._order):
            self.epoch, self.position = self.epoch + 1, 0
            self._order = self._shuffled()
        self.position += 1
        return self._order[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]
        self._order = self._shuffled()

    def _shuffled(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        if not self.bucketed:
            return [batch.tolist() for batch in order.split(self.batch)]
        pools = order.split(POOL * self.batch)
        batches = [b for pool in pools for b in pool[self.lengths[pool].argsort(stable=True)].split(self.batch)]
        return [batches[i].tolist() for i in torch.randperm(len(batches), generator=generator).tolist()]


def by_length(lengths: Sequence[int], batch: int) -> list[list[int]]:
    """All examples once, the longest first: what an evaluation takes (too little memory shows at once)."""
    order = torch.tensor(lengths).argsort(descending=True, stable=True)
    return [numbers.tolist() for numbers in order.split(batch)]

"""What a step of fine-tuning learns from: the batches of its passes."""

from collections.abc import Sequence

from torch import Tensor

from ..data import Buckets
from .tasks import Feature, Task

Pass = tuple[dict[str, Tensor], float]  # a batch, and its share of the step's targets
Passes = tuple[list[int], list[Pass]]  # the numbers of a step's examples, and its passes


class ExampleBatches:
    """A loader of steps.

    Args:
        buckets: the numbers of each step's examples.
        features: of all examples.
        most: examples in one pass.
    """

    def __init__(self, buckets: Buckets, features: Sequence[Feature], task: Task, most: int):
        self._buckets, self._features, self._task, self._most = buckets, features, task, most

    def next(self) -> Passes:
        numbers = self._buckets.next()
        parts = [numbers[i : i + self._most] for i in range(0, len(numbers), self._most)]
        batches = [self._task.collate([self._features[i] for i in part]) for part in parts]
        targets = [self._task.targets(batch) for batch in batches]
        shares = [count / max(1, sum(targets)) for count in targets]
        return numbers, list(zip(batches, shares, strict=True))

    def state_dict(self) -> dict[str, int]:
        return self._buckets.state_dict()

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._buckets.load_state_dict(state)

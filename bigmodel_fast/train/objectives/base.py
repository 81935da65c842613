"""What every objective has."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, TypeVar

from torch import Tensor, nn

from ...data import Tokenizer
from ..config import TrainConfig

Batch = tuple[Tensor, ...]  # what a pass takes, of shapes that the objective knows
Progress = Callable[[int, int], None]  # characters done, and in all


T_co = TypeVar("T_co", covariant=True)


class Loader(Protocol[T_co]):
    """Endless batches in an order that can be left and taken up again: `state_dict` is the position."""

    def next(self) -> T_co: ...

    def state_dict(self) -> dict[str, int]: ...

    def load_state_dict(self, state: dict[str, int]) -> None: ...


class Objective(ABC):
    """What a run learns: its data, its model, the loss of a batch, and what a model is measured by.

    The constructor reads the data; it draws nothing from torch's generators.

    Raises:
        ConfigError, DataError: the data cannot be used, or not with these settings.
    """

    model_name: str
    tokenizer: Tokenizer
    batches: Loader[Batch]  # of the training data, those of a pass at a time
    corpus: dict[str, int]  # tells one corpus from another
    train_tokens: int
    validation_tokens: int
    tokens_per_step: int  # that go through the model; the average, where steps differ

    def __init__(self, config: TrainConfig):
        self.config = config

    @abstractmethod
    def build(self) -> nn.Module:
        """The model, its weights drawn from torch's generator; its `config` is a dataclass."""

    @abstractmethod
    def loss(self, model: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        """Mean over the batch's targets, in nats; a scalar in float32."""

    @abstractmethod
    def targets(self, *batch: Tensor) -> Tensor:
        """The tokens to predict, [targets]."""

    @abstractmethod
    def validation(self) -> list[Batch]:
        """What a model is measured on, the same each time."""

    @abstractmethod
    def flops_per_token(self, model: nn.Module) -> float:
        """Floating-point operations of forward and backward, for each token that goes through the model."""

    def tokens(self, *batch: Tensor) -> int:
        """How many tokens of a batch go through the model."""
        return batch[0].numel()

    def share(self, *batch: Tensor) -> float | Tensor:
        """How much of its step's targets a batch has; a step's loss is the sum of losses times shares."""
        return 1 / self.config.optim.accumulation

    def part(self, rank: int, ranks: int, *batch: Tensor) -> Batch:
        """What a rank takes of a batch that is for all of them: its rows, here; of as many for each."""
        rows = len(batch[0]) // ranks
        return tuple(t[rank * rows : (rank + 1) * rows] for t in batch)

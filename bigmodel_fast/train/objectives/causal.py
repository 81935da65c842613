"""Causal language modelling: a GPT predicts each token from those before it."""

from collections.abc import Callable

from torch import Tensor, nn

from ...models import GPT
from ..config import TrainConfig
from .base import Batch, Progress
from .text import TextObjective


class CausalLM(TextObjective):
    """Batches are tokens and the tokens after them, [batch, context] each."""

    model_name = "GPT"

    def __init__(self, config: TrainConfig, progress: Progress):
        super().__init__(config, progress, config.model.context)
        self.batches = self.train_windows

    def build(self) -> GPT:
        return GPT(self.config.model.of("clm", self.tokenizer.vocab_size))

    def loss(self, model: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        return model(*batch)

    def targets(self, *batch: Tensor) -> Tensor:
        return batch[1].flatten()

    def validation(self) -> list[Batch]:
        return [*self.validation_windows.spread(self.validation_count())]

    def flops_per_token(self, model: nn.Module) -> float:
        assert isinstance(model, GPT)
        return model.flops_per_token(self.config.model.context)

"""Masked language modelling: a BERT predicts tokens that are masked, from both sides."""

from collections.abc import Callable

from torch import Tensor, nn

from ...data.masking import NO_TARGET, MaskedBatches, Masking
from ...models import BERT
from ..config import TrainConfig
from .base import Batch, Progress
from .text import TextObjective


class MaskedLM(TextObjective):
    """Batches are tokens [batch, context], positions and targets [batch, masked].

    The draws have the seed of the run: a position in the data has the same masks however often a run is resumed.
    """

    model_name = "BERT"

    def __init__(self, config: TrainConfig, progress: Progress):
        window = config.model.context - 1  # behind the token that begins each sequence
        super().__init__(config, progress, window)
        mlm = config.mlm
        self.masking = Masking(self.tokenizer, window, mlm.share, mlm.whole_words, config.seed)
        self.batches = MaskedBatches(self.train_windows, self.masking)

    def build(self) -> BERT:
        return BERT(self.config.model.of("mlm", self.masking.vocab_size))

    def loss(self, model: Callable[..., Tensor], *batch: Tensor) -> Tensor:
        return model(*batch)

    def targets(self, *batch: Tensor) -> Tensor:
        targets = batch[2]
        return targets[targets != NO_TARGET]

    def validation(self) -> list[Batch]:
        return [*MaskedBatches(self.validation_windows, self.masking).spread(self.validation_count())]

    def flops_per_token(self, model: nn.Module) -> float:
        assert isinstance(model, BERT)
        context = self.config.model.context
        return model.flops_per_token(context, self.masking.count / context)

"""What a run can learn: one class for each setting of `objective`."""

from collections.abc import Callable

from ..config import TrainConfig
from .base import Batch, Loader, Objective, Progress
from .causal import CausalLM
from .masked import MaskedLM
from .seq2seq import Seq2Seq

OBJECTIVES: dict[str, Callable[[TrainConfig, Progress], Objective]] = {
    "clm": CausalLM,
    "mlm": MaskedLM,
    "seq2seq": Seq2Seq,
}


def make_objective(config: TrainConfig, progress: Progress = lambda done, total: None) -> Objective:
    """The objective that `config` names, its data read.

    Args:
        progress: called with characters tokenized and in all, where text has to be tokenized first.

    Raises:
        ConfigError, DataError: the data cannot be used, or not with these settings.
    """
    return OBJECTIVES[config.objective](config, progress)


__all__ = ["OBJECTIVES", "Batch", "Loader", "Objective", "Progress", "Seq2Seq", "make_objective"]

"""What objectives over running text share: a tokenized corpus of which batches are windows."""

import zlib
from collections.abc import Mapping

import numpy as np

from ...data import Batches, DataError, prepare
from ..config import TrainConfig
from ..errors import ConfigError
from .base import Objective, Progress


class TextObjective(Objective):
    """Windows of a corpus.

    Args:
        window: tokens of the corpus that a sequence takes.
    """

    def __init__(self, config: TrainConfig, progress: Progress, window: int):
        super().__init__(config)
        try:
            self.files = prepare(
                config.data,
                config.cache_folder / "tokens",
                tokenizer=config.tokenizer,
                vocab_size=config.vocab_size,
                progress=progress,
            )
        except OSError as error:
            raise unusable(config, error) from None
        self.tokenizer = self.files.tokenizer
        self.train_tokens, self.validation_tokens = len(self.files.train), len(self.files.validation)
        self.corpus = fingerprint(
            self.tokenizer.vocab_size, {"train": self.files.train, "validation": self.files.validation}
        )
        self.train_windows = Batches(self.files.train, config.optim.batch, window, seed=config.seed)
        rows = min(config.optim.batch, (self.validation_tokens - 1) // window)
        if rows < 1:
            raise DataError(
                f"the validation text has {self.validation_tokens} tokens, less than a sequence of {window} + 1; "
                "give more text with --data, or lower model.context"
            )
        self.validation_windows = Batches(self.files.validation, rows, window, what="the validation text")
        o = config.optim
        self.tokens_per_step = o.batch * o.accumulation * config.model.context

    def validation_count(self) -> int:
        """Batches that one measurement takes."""
        return max(1, self.config.eval_sequences // self.validation_windows.batch)


def unusable(config: TrainConfig, error: OSError) -> ConfigError:
    """The error for data that cannot be read or kept."""
    return ConfigError(f"data or cache: {error.filename or config.cache_folder}: {error.strerror}")


def fingerprint(vocab_size: int, splits: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Tells one tokenized corpus from another: sizes, and a checksum of up to a million tokens all over each split."""
    values = {"vocab_size": vocab_size}
    for split, tokens in splits.items():
        some = np.ascontiguousarray(tokens[:: len(tokens) // 1_000_000 + 1])
        values |= {f"{split}_tokens": len(tokens), f"{split}_crc32": zlib.crc32(some.tobytes())}
    return values

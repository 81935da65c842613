"""What a run tells while it goes on. A `Reporter` of your own shows it; the one here stays silent."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Start:
    """A run about to begin: shape, size and place of everything."""

    model: str  # its name
    parameters: int
    train_tokens: int
    validation_tokens: int
    tokens_per_step: int
    vocab_size: int
    device: str
    dtype: str
    threads: int
    out: Path
    step: int  # done already, by the run that is resumed


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    step: int  # steps done, this one included
    loss: float  # nats per token, of the step's batch
    learning_rate: float
    gradient_norm: float  # before clipping
    tokens_per_second: float
    gflops: float  # 1e9 floating-point operations per second of forward and backward, as the model counts them
    progress: float  # 0 to 1, of the budget
    elapsed: float  # seconds of training, those before a resume included
    left: float  # seconds


@dataclass(frozen=True)
class Evaluation:
    """The validation text, measured."""

    step: int
    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float  # does not depend on the tokenizer


class Reporter:
    """Overwrite what you want to see."""

    def preparing(self, done: int, total: int) -> None:
        """Text is being tokenized: characters done, and in all."""

    def prepared(self) -> None:
        """The text is ready, or could not be made so."""

    def start(self, start: Start) -> None: ...

    def step(self, step: Step) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None: ...

    def saved(self, path: Path) -> None:
        """A checkpoint was written."""

    def message(self, text: str) -> None:
        """Something to know, such as a damaged checkpoint that was passed over."""

    def end(self) -> None:
        """No more steps follow, whatever the reason."""

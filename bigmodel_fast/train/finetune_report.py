"""What a fine-tuning run tells of itself while it goes on."""

from dataclasses import dataclass
from pathlib import Path

from .tasks import Judgement


@dataclass(frozen=True)
class FinetuneStart:
    """A run about to begin."""

    model: str
    parameters: int
    trained: int  # parameters that are trained
    examples: int
    validation: int
    steps: int
    dtype: str
    device: str
    threads: int
    out: Path
    step: int  # done already, by the run that is resumed

    def __str__(self) -> str:
        share = "" if self.trained == self.parameters else f", {self.trained / 1e6:.2f} million of them trained"
        resumed = f", resumed after step {self.step}" if self.step else ""
        return (
            f"{self.model} of {self.parameters / 1e6:.2f} million parameters{share}, {self.dtype} on {self.device}, "
            f"{self.threads} threads\n"
            f"{self.examples:,} examples, {self.validation:,} to validate; {self.steps:,} steps; in {self.out}{resumed}"
        )


@dataclass(frozen=True)
class FinetuneEvaluation:
    """The validation examples, measured."""

    step: int
    judgement: Judgement
    best: bool  # so far

    def __str__(self) -> str:
        return f"validation {self.judgement}{'  (best)' if self.best else ''}"

"""How pretrain shows a run: a bar on a terminal, lines elsewhere."""

import math
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ..train import Evaluation, Reporter, Start, Step

SMOOTHING = 0.1  # weight of the newest step in the speed that the bar shows


def reporter_for_terminal(log_every: int) -> Reporter:
    """A bar if stdout is a terminal, else a line every `log_every` steps."""
    return Bar() if sys.stdout.isatty() else Lines(log_every)


class Lines(Reporter):
    """Plain lines on stdout."""

    def __init__(self, every: int):
        self.every = every

    def line(self, text: str) -> None:
        print(text, flush=True)

    def preparing(self, done: int, total: int) -> None:
        if done == total:
            self.line(f"tokenized {total / 1e6:.1f} million characters")

    def about(self, start: Start) -> str:
        return describe(start)

    def about_evaluation(self, evaluation: Evaluation) -> str:
        return describe_evaluation(evaluation)

    def start(self, start: Start) -> None:
        self.line(self.about(start))

    def step(self, step: Step) -> None:
        if step.step % self.every == 0:
            self.line(
                f"step {step.step:5d}  loss {step.loss:.4f}  lr {step.learning_rate:.2e}  "
                f"norm {step.gradient_norm:.2f}  {step.tokens_per_second:,.0f} tokens/s  "
                f"{step.gflops:,.0f} GFLOP/s  {clock(step.left)} left"
            )

    def evaluation(self, evaluation: Evaluation) -> None:
        self.line(f"step {evaluation.step:5d}  {self.about_evaluation(evaluation)}")

    def saved(self, path: Path) -> None:
        self.line(f"saved {path}")

    def message(self, text: str) -> None:
        self.line(text)


class Bar(Lines):
    """A bar that stays at the bottom, with evaluations and checkpoints as lines above it."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(every=1)
        self._rate = self._gflops = 0.0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.percentage:3.0f}%  {task.fields[text]}"),
            console=console or Console(highlight=False),
            expand=True,
        )
        self._task = self._progress.add_task("preparing", total=1.0, text="")

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False)

    def preparing(self, done: int, total: int) -> None:
        self._progress.start()
        self._progress.update(self._task, description="tokenizing", completed=done / total)

    def prepared(self) -> None:
        self._progress.stop()

    def start(self, start: Start) -> None:
        self.line(self.about(start))
        self._progress.update(self._task, description=f"step {start.step}", completed=0.0)
        self._progress.start()

    def step(self, step: Step) -> None:
        share = SMOOTHING if self._rate else 1.0
        self._rate += share * (step.tokens_per_second - self._rate)
        self._gflops += share * (step.gflops - self._gflops)
        self._progress.update(
            self._task,
            description=f"step {step.step}",
            completed=step.progress,
            text=f"loss [bold]{step.loss:.3f}[/]  {self._rate:,.0f} tokens/s  {self._gflops:,.0f} GFLOP/s  "
            f"{clock(step.left)} left",
        )

    def end(self) -> None:
        self._progress.stop()


def describe(start: Start) -> str:
    """The run about to begin, on two lines."""
    resumed = f", resumed after step {start.step}" if start.step else ""
    return (
        f"{start.model} of {start.parameters / 1e6:.2f} million parameters, vocabulary {start.vocab_size}, "
        f"{start.dtype} on {start.device}, {start.threads} threads\n"
        f"{start.train_tokens:,} tokens of text, {start.validation_tokens:,} to validate; "
        f"{start.tokens_per_step:,} a step; in {start.out}{resumed}"
    )


def describe_evaluation(evaluation: Evaluation) -> str:
    """Validation loss, perplexity and bits per byte, on one line."""
    return (
        f"validation loss {evaluation.loss:.4f}  perplexity {evaluation.perplexity:.2f}  "
        f"{evaluation.bits_per_byte:.3f} bits per byte"
    )


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

"""How right `bigmodel-fast plan` is: its predictions of memory and time beside measured training steps on the CPU.

bigmodel-fast bench plan
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bigmodel_fast.models import (
    BERT,
    GPT,
    BERTConfig,
    GPTConfig,
    Transformer,
    TransformerConfig,
    pack,
    recompute_layers,
)
from bigmodel_fast.optim import AdamW
from bigmodel_fast.plan import Hardware, Shape, Step, memory, step_seconds
from bigmodel_fast.plan.measure import measure

from .cases import BENCH_SEED, autocast
from .memory import peak_of_process

if TYPE_CHECKING:
    from rich.table import Table

MEMORY_OFF, TIME_OFF = 0.15, 0.25  # how far a prediction may be from what is measured, as a share of it
STEPS_OF_MEMORY = 3  # the pools are as full after the second as they ever get
PREDICTED = 0.15  # share of a BERT's tokens


@dataclass(frozen=True)
class Setup:
    """A training step to be predicted: the model, its batch and its dtype.

    Sequences fill the context; pairs have as many tokens as it on both sides together.
    """

    config: GPTConfig | BERTConfig | TransformerConfig
    batch: int
    dtype: str  # "bf16" (autocast with float32 weights) or "fp32"
    recompute: bool = False

    @property
    def name(self) -> str:
        c = self.config
        kind = c.layout if isinstance(c, GPTConfig) else type(c).__name__.removesuffix("Config")
        return (
            f"{kind}, {c.layers} layers, {c.width} wide, vocabulary {c.vocab_size}, "
            f"{self.batch}x{c.context} tokens, {self.dtype}{', --recompute' if self.recompute else ''}"
        )


def _setup(
    layers: int, width: int, vocab_size: int, batch: int, context: int, dtype: str,
    model: type = GPTConfig, recompute: bool = False, **shape,
) -> Setup:  # fmt: skip
    config = model(vocab_size, context, layers, max(1, width // 64), width, **shape)
    return Setup(config, batch, dtype, recompute)


SETUPS = (
    _setup(4, 128, 512, 16, 128, "fp32"),
    _setup(4, 256, 2048, 8, 256, "bf16", layout="modern"),
    _setup(6, 384, 8192, 4, 512, "fp32"),
    _setup(8, 512, 16384, 1, 1024, "bf16", layout="modern"),
    _setup(4, 768, 50304, 4, 512, "bf16"),
    _setup(6, 768, 32000, 2, 1024, "fp32", layout="modern", kv_heads=4),
    _setup(8, 384, 4096, 8, 256, "bf16", layout="modern", recompute=True),
    _setup(4, 256, 2048, 8, 256, "fp32", BERTConfig),
    _setup(6, 384, 8192, 16, 128, "bf16", BERTConfig),
    _setup(8, 384, 4096, 16, 128, "bf16", BERTConfig, recompute=True),
    _setup(3, 256, 8192, 128, 40, "bf16", TransformerConfig),
    _setup(4, 256, 4096, 96, 48, "fp32", TransformerConfig, recompute=True),
)
TINY = _setup(1, 64, 260, 1, 16, "fp32")


def make_step(setup: Setup) -> Callable[[], None]:
    """A function that makes a step as `pretrain` does: loss and gradients, clipping, AdamW."""
    torch.manual_seed(BENCH_SEED)
    model, batch = model_and_batch(setup)
    recompute_layers(model, setup.recompute)
    optimizer = AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        with autocast(setup.dtype, torch.device("cpu")):
            loss = model(*batch)
        loss.backward()
        optimizer.clip_grad_norm(1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def model_and_batch(setup: Setup) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """A model, and what its forward takes to make a loss."""
    c, batch = setup.config, setup.batch
    tokens = torch.randint(c.vocab_size, (batch, c.context))
    if isinstance(c, GPTConfig):
        return GPT(c), (tokens, tokens.roll(-1, 1))
    if isinstance(c, BERTConfig):
        positions = torch.rand(tokens.shape).argsort(1)[:, : max(1, round(PREDICTED * c.context))]
        return BERT(c), (tokens, positions, tokens.gather(1, positions))
    lengths = [c.context // 4 + round(i * c.context / 2 / max(1, batch - 1)) for i in range(batch)]
    sides = [[tokens[i, :length].tolist() for i, length in enumerate(order)] for order in (lengths, lengths[::-1])]
    source, target = (pack(side) for side in sides)
    return Transformer(c), (*source, *target, target[0].roll(-1))


def measured_memory(setup: Setup, threads: int) -> int | None:
    """Bytes that model, optimizer and steps take at most, in a process of their own; None where no one can tell."""
    return peak_of_process(_prepare, setup, threads)


def _prepare(setup: Setup, threads: int) -> Callable[[], None]:
    torch.set_num_threads(threads)
    make_step(TINY)()  # the libraries' own pages and threads

    def run() -> None:
        step = make_step(setup)
        for _ in range(STEPS_OF_MEMORY):
            step()

    return run


def measured_seconds(setup: Setup, *, seconds: float = 3.0, least: int = 3) -> float:
    """Median time of a step, over `seconds` and at least so many of them, after two that warm up."""
    step, times = make_step(setup), list[float]()
    for _ in range(2):
        step()
    deadline = time.perf_counter() + seconds
    while len(times) < least or time.perf_counter() < deadline:
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


@dataclass(frozen=True)
class Prediction:
    """A setup's memory in bytes and time of a step in seconds, predicted and measured (None: not known)."""

    setup: Setup
    memory: float
    seconds: float
    measured_memory: int | None
    measured_seconds: float

    @property
    def memory_off(self) -> float:
        """As a share of what was measured; negative: too little was predicted."""
        return 0.0 if self.measured_memory is None else self.memory / self.measured_memory - 1

    @property
    def time_off(self) -> float:
        return self.seconds / self.measured_seconds - 1

    @property
    def holds(self) -> bool:
        return abs(self.memory_off) <= MEMORY_OFF and abs(self.time_off) <= TIME_OFF


def predict(setup: Setup, hardware: Hardware) -> tuple[float, float]:
    """Bytes and seconds of a setup's step."""
    shape = Shape.of(setup.config, PREDICTED)
    step = Step(setup.batch, setup.config.context, setup.dtype, recompute=setup.recompute)
    seconds = step_seconds(shape, step, hardware.rates[setup.dtype], hardware.call)
    return memory(shape, step).peak, sum(seconds.values())


def predictions(setups: Iterable[Setup] = SETUPS) -> Iterator[Prediction]:
    """Measures the machine once for each dtype, then each setup."""
    setups = tuple(setups)
    machine = {dtype: measure(torch.device("cpu"), dtype) for dtype in dict.fromkeys(s.dtype for s in setups)}
    for setup in setups:
        took = measured_seconds(setup)
        yield Prediction(
            setup, *predict(setup, machine[setup.dtype]), measured_memory(setup, torch.get_num_threads()), took
        )


def table(found: Iterable[Prediction]) -> Table:
    from rich.table import Table

    made = Table(title="plan: a training step, predicted and measured", title_justify="left")
    for name in ("setup", "memory: predicted", "measured", "off", "time: predicted", "measured", "off"):
        made.add_column(name, justify="left" if name == "setup" else "right")
    for p in found:
        known = p.measured_memory is not None
        made.add_row(
            p.setup.name,
            f"{p.memory / 2**20:,.0f} MiB",
            f"{p.measured_memory / 2**20:,.0f} MiB" if p.measured_memory is not None else "not known",
            f"{p.memory_off:+.1%}" if known else "",
            f"{p.seconds * 1e3:,.0f} ms",
            f"{p.measured_seconds * 1e3:,.0f} ms",
            f"{p.time_off:+.1%}",
            style=None if p.holds else "red",
        )
    return made

"""A plan: what fits on a machine, how to cut a step, how long a run takes, and what it costs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch

from ..data import find_documents
from ..train import ConfigError, TrainConfig, pick_device, pick_dtype
from ..train.objectives import make_objective
from . import cost, network
from .cost import Memory, Step
from .hardware import Hardware, named
from .shape import Shape, amount, of_hugging_face, sized

THIS = "this"
TOKENS_PER_PARAMETER = 20  # compute-optimal (Hoffmann et al. 2022, tables 2 and 3)
BYTES_OF_PROCESS = {"cpu": 0.5e9, "cuda": 1.5e9}  # libraries, threads, the CUDA context and its fragments
USABLE = 0.95  # of a device's memory
SAME_SPEED = 0.02  # options nearer than this are as fast as each other, and the one of less memory is taken
SIZES = tuple(2.0**i for i in range(-3, 4))  # of models beside the planned one, as multiples of it
MOST_DEVICES = 1024


@dataclass
class PlanConfig(TrainConfig):
    """A run to be planned; all options of pretrain are taken, so that a run's own config.yaml can be planned.

    Args:
        size: parameters of a model to be planned, such as 7B, in place of --model. Then --vocab_size is 32000,
            --model.context 2048 and --optim.batch 256 unless they are given.
        hf: a folder of a Hugging Face model, or its config.json, in place of --model.
        tokens: of the run, such as 300M. Without tokens, hours, budget, steps and minutes: those of --data once over,
            or without it 20 for each parameter.
        hours: time to spend, in place of tokens.
        budget: US dollars to spend, in place of tokens.
        hardware: this (measured now, ten seconds), or a row of the table: --hardware list shows it.
        gpus: devices of that row, up to 1024.
        price: of one device and hour in US dollars. null: the table's.
        json: print JSON instead of tables.
        chart: a PNG to draw: memory by part, and speed, for each way to cut the step.
    """

    size: str | None = None
    hf: str | None = None
    tokens: str | None = None
    hours: float | None = None
    budget: float | None = None
    hardware: str = THIS
    gpus: int = 1
    price: float | None = None
    json: bool = False
    chart: str | None = None

    def check(self) -> None:
        super().check()
        for key in ("size", "hf") if self.objective != "clm" else ():
            if getattr(self, key) is not None:
                raise ConfigError(f"{key}: for objective clm only; give the model by --model")
        lengths = (self.tokens, self.hours, self.budget, self.steps, self.minutes, self.data)
        if self.objective != "clm" and not any(lengths):
            raise ConfigError(
                f"tokens: the length of a run of {self.objective} must be given, as tokens, hours or data"
            )
        for key in ("hours", "budget", "price"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{key} must be more than 0, got {value}")
        if not 1 <= self.gpus <= MOST_DEVICES:
            raise ConfigError(f"gpus must lie between 1 and {MOST_DEVICES}, got {self.gpus}")
        given = [key for key in ("tokens", "hours", "budget") if getattr(self, key) is not None]
        if len(given) > 1:
            raise ConfigError(f"{given[1]}: the run's length is given by {given[0]} already; leave one out")
        if self.size is not None and self.hf is not None:
            raise ConfigError("hf: the model is given by size already; leave one out")
        if self.budget is not None and self.hardware == THIS and self.price is None:
            raise ConfigError("budget: the price of this machine is not known; give it with --price")
        if self.chart is not None and not Path(self.chart).expanduser().absolute().parent.is_dir():
            raise ConfigError(f"chart: there is no folder for {self.chart}")


@dataclass(frozen=True)
class Option:
    """A way to run the step, and what it takes of each device.

    Args:
        recompute: `pretrain --recompute`.
        parallel: "one" device, "ddp" (all weights on each) or "fsdp" (weights, gradients and states in parts).
        seconds: of a step, with communication.
        work: seconds by kind; "communication" is what is not hidden behind the others.
    """

    batch: int
    accumulation: int
    recompute: bool
    parallel: str
    memory: Memory
    fits: bool
    seconds: float
    tokens_per_second: float
    work: dict[str, float]


@dataclass(frozen=True)
class Size:
    """A model of the frontier: trained on 20 tokens a parameter, on the same devices."""

    parameters: int
    tokens: float
    flops: float
    hours: float | None  # None: it does not fit
    dollars: float | None


@dataclass(frozen=True)
class Plan:
    """All that `bigmodel-fast plan` shows. Sizes are in bytes; times in the unit of their name."""

    name: str
    shape: Shape
    parameters: int
    hardware: Hardware
    devices: int
    dtype: str
    price: float | None  # of all devices, an hour
    usable_memory: float  # of a device, for a run
    sequences: int  # of a step
    tokens_per_step: int
    options: list[Option]
    best: Option | None
    run: dict[str, float | None] = field(default_factory=dict)
    sizes: list[Size] = field(default_factory=list)
    optimal: Size | None = None  # for the time of the run


def make_plan(config: PlanConfig, machine: Hardware | None = None) -> Plan:
    """Plans a run. ConfigError or DataError for what cannot be planned, before anything is measured.

    Args:
        machine: measured before; None: it is measured if `config.hardware` is this.
    """
    config.check()
    shape, name = shape_of(config)
    sequences = config.optim.batch * config.optim.accumulation
    if sequences % config.gpus:
        raise ConfigError(
            f"gpus: the {sequences} sequences of a step (optim.batch x optim.accumulation) cannot be divided among "
            f"{config.gpus}"
        )
    context, of_data = length_of(config, shape)
    wanted = tokens_wanted(config, shape, sequences * context, of_data)
    hardware, dtype = machine_of(config, machine)
    each = config.price if config.price is not None else hardware.price
    price = None if each is None else each * config.gpus
    found = options(shape, context, dtype, hardware, config.gpus, sequences)
    best = best_of(found)
    made = Plan(
        name=name,
        shape=shape,
        parameters=shape.parameters(),
        hardware=hardware,
        devices=config.gpus,
        dtype=dtype,
        price=price,
        usable_memory=usable(hardware),
        sequences=sequences,
        tokens_per_step=sequences * context,
        options=found,
        best=best,
    )
    if best is None:
        return made
    hours = config.hours if config.budget is None else config.budget / cast(float, price)
    if hours is None and wanted is None:
        hours = cast(float, config.minutes) / 60
    tokens = wanted if hours is None else hours * 3600 * best.tokens_per_second
    assert tokens is not None
    hours = tokens / best.tokens_per_second / 3600
    run = {
        "tokens": tokens,
        "steps": tokens / made.tokens_per_step,
        "flops": tokens * shape.flops_per_token(context),
        "tokens_per_parameter": tokens / made.parameters,
        "hours": hours,
        "dollars": None if price is None else hours * price,
    }
    if config.objective != "clm":  # what is compute-optimal is known of GPTs
        return replace(made, run=run)

    def at(parameters: float) -> Size:
        return size_of(parameters, shape.vocab_size, context, dtype, hardware, config.gpus, sequences, price)

    sizes = [at(made.parameters * times) for times in SIZES if 10**5 <= made.parameters * times <= 10**13]
    return replace(made, run=run, sizes=sizes, optimal=optimal_for(hours, at))


def shape_of(config: PlanConfig) -> tuple[Shape, str]:
    """The model, and what to call it."""
    if config.hf is not None:
        return of_hugging_face(config.hf), config.hf
    if config.size is not None:
        return sized(amount(config.size, "size"), config.vocab_size, config.model.context), config.size
    name = {"clm": config.model.layout, "mlm": "BERT", "seq2seq": "Transformer"}[config.objective]
    return Shape.of(config.model.of(config.objective, config.vocab_size), config.mlm.share), name


def length_of(config: PlanConfig, shape: Shape) -> tuple[int, float | None]:
    """Tokens of a sequence (of seq2seq, of a pair), and those of --data where they had to be counted for it.

    Pairs are those of --data, tokenized as the run would; without it both sentences fill the context.
    """
    if config.objective != "seq2seq":
        return config.model.context if config.hf is None else min(config.model.context, shape.context), None
    if config.data is None:
        return 2 * config.model.context, None
    objective = make_objective(config)
    each = objective.tokens_per_step / (config.optim.batch * config.optim.accumulation)
    return max(2, round(each)), float(objective.train_tokens)


def tokens_wanted(config: PlanConfig, shape: Shape, tokens_per_step: int, of_data: float | None) -> float | None:
    """Of the run; None if it is bounded by time or money."""
    if config.tokens is not None:
        return float(amount(config.tokens, "tokens"))
    if config.hours is not None or config.budget is not None:
        return None
    if config.steps is not None:
        return float(config.steps * tokens_per_step)
    if config.minutes is not None:
        return None
    if config.data is not None:
        return tokens_of_data(config) if of_data is None else of_data
    return float(TOKENS_PER_PARAMETER * shape.parameters())


def tokens_of_data(config: PlanConfig) -> float:
    """About so many tokens a text has, by its bytes."""
    size = sum(path.stat().st_size for path in find_documents(config.data))
    return size / (1.0 if config.tokenizer == "bytes" else bytes_per_token(config.vocab_size))


def bytes_per_token(vocab_size: int) -> float:
    """Of a byte-level BPE trained on the text itself.

    Within 8% for vocabularies of 512 to 32,000 on Python's standard library and on Shakespeare's plays.
    """
    return 2.0 * math.log2(vocab_size / 256) ** 0.36 if vocab_size >= 512 else 1.5


def machine_of(config: PlanConfig, machine: Hardware | None) -> tuple[Hardware, str]:
    """The hardware and the dtype of the run."""
    if config.hardware != THIS:
        return named(config.hardware), "bf16" if config.dtype == "auto" else config.dtype
    device = pick_device(config.device)
    if config.gpus > 1 and device.type == "cpu":
        raise ConfigError("gpus: more than one is planned for a row of the table; give it with --hardware")
    dtype = pick_dtype(config.dtype, device)
    if machine is None:
        from .measure import measure

        if config.threads is not None:
            torch.set_num_threads(config.threads)
        machine = measure(device, dtype)
    return machine, dtype


# ---- the step ----


def usable(hardware: Hardware) -> float:
    """Bytes that a run may take of a device."""
    return USABLE * hardware.memory - BYTES_OF_PROCESS[hardware.kind]


def options(shape: Shape, context: int, dtype: str, hardware: Hardware, devices: int, sequences: int) -> list[Option]:
    """All ways to cut a step of `sequences` (of all devices together)."""
    each = sequences // devices
    return [
        option(
            shape,
            Step(batch, context, dtype, each // batch, recompute, cpu=hardware.kind == "cpu"),
            hardware,
            devices,
            parallel,
        )
        for parallel in (("one",) if devices == 1 else ("ddp", "fsdp"))
        for recompute in (False, True)
        for batch in range(1, each + 1)
        if each % batch == 0
    ]


def option(shape: Shape, step: Step, hardware: Hardware, devices: int, parallel: str) -> Option:
    """One of them."""
    step = replace(step, shards=devices if parallel == "fsdp" else 1)
    memory = cost.memory(shape, step)
    work = cost.step_seconds(shape, step, hardware.rates[step.dtype], hardware.call)
    alone = sum(work.values())
    seconds, passes = alone, alone - work["optimizer"]
    links = network.Network(devices, hardware.node, hardware.link, hardware.network)
    if parallel == "ddp":
        together = network.ddp_seconds(links, passes, step.accumulation, shape.parameters(), shape.layers)
        seconds = together + work["optimizer"]
    elif parallel == "fsdp":
        together = network.fsdp_seconds(
            links, passes, step.accumulation, shape.parameters(), shape.layers, cost.BYTES[step.dtype]
        )
        seconds = together + work["optimizer"]
    return Option(
        batch=step.batch,
        accumulation=step.accumulation,
        recompute=step.recompute,
        parallel=parallel,
        memory=memory,
        fits=memory.peak <= usable(hardware),
        seconds=seconds,
        tokens_per_second=step.tokens * step.accumulation * devices / seconds,
        work={**work, "communication": seconds - alone},
    )


def best_of(found: list[Option]) -> Option | None:
    """The fastest that fits; of those that are as fast, the one of least memory. None if none fits."""
    fitting = [o for o in found if o.fits]
    if not fitting:
        return None
    enough = (1 - SAME_SPEED) * max(o.tokens_per_second for o in fitting)
    return min((o for o in fitting if o.tokens_per_second >= enough), key=lambda o: o.memory.peak)


# ---- sizes ----


def size_of(
    parameters: float,
    vocab_size: int,
    context: int,
    dtype: str,
    hardware: Hardware,
    devices: int,
    sequences: int,
    price: float | None,
) -> Size:
    """A model of about so many parameters and its compute-optimal run: 20 tokens for each (Hoffmann et al. 2022)."""
    shape = sized(round(parameters), vocab_size, context)
    best = best_of(options(shape, context, dtype, hardware, devices, sequences))
    tokens = float(TOKENS_PER_PARAMETER * shape.parameters())
    hours = None if best is None else tokens / best.tokens_per_second / 3600
    dollars = None if hours is None or price is None else hours * price
    return Size(shape.parameters(), tokens, tokens * shape.flops_per_token(context), hours, dollars)


def optimal_for(hours: float, at: Callable[[float], Size], least: float = 10**5, most: float = 10**13) -> Size | None:
    """The largest model whose compute-optimal run takes `hours` at most; None if that of `least` takes more."""
    found = at(least)
    if found.hours is None or found.hours > hours:
        return None
    while most / least > 1.02:
        middle = math.sqrt(least * most)
        tried = at(middle)
        if tried.hours is None or tried.hours > hours:
            most = middle
        else:
            least, found = middle, tried
    return found

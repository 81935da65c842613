"""What a benchmark declares: cases (inputs and options), providers to compare, and the work done, as data.

A `Benchmark` turns one provider, one case and one dtype into a `Task`, which the engine can run, time and check. There
are two kinds: `OpBenchmark` for functions with a gradient, `StepBenchmark` for whatever updates its own state.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from bigmodel_fast import _dispatch
from bigmodel_fast.ops import _cuda

OURS, EAGER, COMPILE = "bigmodel_fast", "eager", "compile"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
BENCH_SEED = 0

Results = dict[str, Tensor]


class Clock(Protocol):
    """Time stamps of a device, which may still be behind."""

    def mark(self) -> Any: ...


# ---- inputs ----


@dataclass(frozen=True)
class Draw:
    """One tensor argument: how it is drawn, whether it follows the dtype of the run, whether it has a gradient."""

    make: Callable[[torch.Generator], Tensor]
    follows_dtype: bool
    grad: bool


def _normal(shape: tuple[int, ...], scale: float, follows_dtype: bool, order: tuple[int, ...] | None = None) -> Draw:
    def make(generator: torch.Generator) -> Tensor:
        x = torch.randn(shape, generator=generator, device=generator.device) * scale
        x = x.bfloat16().float() if follows_dtype else x  # the same numbers in every dtype, so one exact result for all
        return x if order is None else x.permute(order)

    return Draw(make, follows_dtype, grad=True)


def normal(*shape: int) -> Draw:
    """An activation: bfloat16 in a bf16 run."""
    return _normal(shape, 1.0, follows_dtype=True)


def projected(batch: int, heads: int, length: int, dim: int) -> Draw:
    """An activation [B, H, S, D] that lies in memory as a projection leaves it, [B, S, H, D]."""
    return _normal((batch, length, heads, dim), 1.0, follows_dtype=True, order=(0, 2, 1, 3))


def weight(*shape: int) -> Draw:
    """A parameter: float32 in every run, as autocast training keeps it; scaled so that outputs stay near 1."""
    return _normal(shape, shape[-1] ** -0.5, follows_dtype=False)


def stream(*shape: int) -> Draw:
    """A residual stream: float32 in every run."""
    return _normal(shape, 1.0, follows_dtype=False)


def classes(*shape: int, count: int) -> Draw:
    """Class numbers in [0, count)."""

    def make(generator: torch.Generator) -> Tensor:
        return torch.randint(count, shape, generator=generator, device=generator.device)

    return Draw(make, follows_dtype=False, grad=False)


def values(make: Callable[[], Tensor]) -> Draw:
    """Given numbers, without a gradient."""
    return Draw(lambda g: make(), follows_dtype=False, grad=False)


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Args:
        name: as tables and `--filter` show it.
        args: tensors by the operator's argument names (of an OpBenchmark).
        options: its other arguments, or whatever a StepBenchmark builds from.
        quick: part of `bench --quick`.
        compiled: dtypes in which torch.compile takes part; it costs seconds to minutes of warm-up for each.
        dtypes: in which the case is run.
        providers: the only ones that know this case; None for all.
    """

    name: str
    args: dict[str, Draw] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    quick: bool = False
    compiled: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("bf16", "fp32")
    providers: tuple[str, ...] | None = None


# ---- tasks ----


class Task(Protocol):
    """One provider on one case, ready to run."""

    def results(self) -> Results:
        """Outputs and gradients of one run, to be checked. Names of gradients start with "grad "."""
        ...

    def run(self, clock: Clock, repeats: int) -> dict[str, tuple[Any, Any]]:
        """Runs `repeats` times; the time stamps at which each direction began and ended."""
        ...


def autocast(dtype: str, device: torch.device) -> AbstractContextManager:
    """bf16 means autocast with float32 weights; fp32 means no autocast."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else nullcontext()


def native(function: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """An operator by our kernels in CUDA C++, in both directions: the provider "native", where this build has them."""

    def forced(*args: Any, **kwargs: Any) -> Tensor:
        with _dispatch.forcing("native"):
            out = function(*args, **kwargs)
        if out.grad_fn is not None:
            backward = ExitStack()
            out.grad_fn.register_prehook(lambda _: backward.enter_context(_dispatch.forcing("native")))
            out.grad_fn.register_hook(lambda *_: backward.close())
        return out

    return {"native": forced} if _cuda.BUILT else {}


class OpTask:
    """A function of tensors, forward under autocast and then backward with fixed upstream gradients."""

    def __init__(self, function: Callable, tensors: dict[str, Tensor], grads: list[str], options: dict, dtype: str):
        self.function, self.options, self.dtype = function, options, dtype
        self.leaves = {name: t.detach().requires_grad_(name in grads) for name, t in tensors.items()}
        self.wanted = {name: self.leaves[name] for name in grads}
        self.device = next(iter(tensors.values())).device
        self.upstream: tuple[Tensor, ...] | None = None

    def forward(self, **options: Any) -> tuple[Tensor, ...]:
        with autocast(self.dtype, self.device):
            outputs = self.function(**self.leaves, **{**self.options, **options})
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.upstream is None:
            self.upstream = tuple(_upstream(y) for y in outputs)
        return torch.autograd.grad(outputs, list(self.wanted.values()), self.upstream)

    def results(self) -> Results:
        # Random numbers cannot be compared, so a case with dropout is checked without it.
        outputs = self.forward(**({"dropout_p": 0.0} if "dropout_p" in self.options else {}))
        grads = self.backward(outputs)
        found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        return found | {f"grad {name}": g for name, g in zip(self.wanted, grads, strict=True)}

    def run(self, clock: Clock, repeats: int) -> dict[str, tuple[Any, Any]]:
        start = clock.mark()
        graphs = [self.forward() for _ in range(repeats)]
        middle = clock.mark()
        while graphs:
            self.backward(graphs.pop())
        end = clock.mark()
        return {"forward": (start, middle), "backward": (middle, end), "both": (start, end)}


def _upstream(y: Tensor) -> Tensor:
    """The gradient that reaches an output: 1 for a loss, fixed random numbers otherwise."""
    if y.dim() == 0:
        return torch.ones_like(y)
    generator = torch.Generator(y.device).manual_seed(BENCH_SEED + 1)
    return torch.randn(y.shape, generator=generator, device=y.device).bfloat16().to(y.dtype)


@dataclass
class StepTask:
    """A step that updates its own state; `results` makes and returns what can be checked before the first one."""

    step: Callable[[], Any]
    results: Callable[[], Results]

    def run(self, clock: Clock, repeats: int) -> dict[str, tuple[Any, Any]]:
        start = clock.mark()
        for _ in range(repeats):
            self.step()
        return {"step": (start, clock.mark())}


# ---- benchmarks ----


def is_compiled(provider: str) -> bool:
    """ "compile", or a variant of it such as "compile cudnn"."""
    return provider.split()[0] == COMPILE


def installed(module: str) -> bool:
    """Whether a package that nobody has to have is there."""
    return importlib.util.find_spec(module) is not None


def amounts(forward: float, backward: float) -> dict[str, float]:
    """Work by direction, from that of each pass."""
    return {"forward": forward, "backward": backward, "both": forward + backward}


@dataclass(frozen=True, kw_only=True)
class Benchmark(ABC):
    """A named set of cases and the providers that run them.

    Args:
        name: of the operator.
        unit: what `work` counts: "FLOP" (compared with the multiply-add peak) or "B" (with the copy bandwidth).
        cases: the default ones first; all of them are run by `bench`.
        cuda_cases: those run on a GPU instead, of sizes that keep one busy.
        tiny: a case of milliseconds: for tests, and to warm a process up before its memory is measured.
        directions: those reported.
        requires: a package that nobody has to have, without which the benchmark is skipped.
    """

    name: str
    unit: str
    cases: tuple[Case, ...]
    cuda_cases: tuple[Case, ...]
    tiny: Case
    directions: tuple[str, ...]
    requires: str | None = None

    @property
    def missing(self) -> str | None:
        """Why it cannot be run here; None if it can."""
        if self.requires is None or installed(self.requires):
            return None
        return f"{self.requires} is not installed: pip install 'bigmodel_fast[{self.requires}]'"

    def cases_on(self, device: str) -> tuple[Case, ...]:
        """The cases for a device of this type, "cpu" or "cuda"."""
        return self.cuda_cases if device == "cuda" else self.cases

    @abstractmethod
    def providers_on(self, device: str) -> tuple[str, ...]:
        """The names of all providers there are for a device of this type."""

    @abstractmethod
    def inputs(self, case: Case, dtype: str, device: torch.device) -> Any:
        """Made once for a case and dtype; every provider gets the same."""

    @abstractmethod
    def task(self, provider: str, case: Case, inputs: Any, dtype: str) -> Task: ...

    @abstractmethod
    def exact(self, case: Case, inputs: Any) -> Results:
        """What `Task.results` should be, in float64. The same for each dtype, since inputs hold the same numbers."""

    @abstractmethod
    def work(self, case: Case, inputs: Any) -> dict[str, float]:
        """Operations or bytes of each direction: what the mathematics needs, whatever a provider really does."""

    def providers(self, case: Case, dtype: str, device: str) -> tuple[str, ...]:
        """Those that take part in a case: torch.compile only where the case asks for it."""
        names = self.providers_on(device)
        known = case.providers or names
        return tuple(p for p in names if p in known and (not is_compiled(p) or dtype in case.compiled))

    def case(self, name: str, device: str = "cpu") -> Case:
        return next(c for c in (*self.cases_on(device), self.tiny) if c.name == name)


@dataclass(frozen=True, kw_only=True)
class OpBenchmark(Benchmark):
    """An operator: functions of the same signature, forward and backward.

    Args:
        functions: by provider; "bigmodel_fast" and "eager" at least. "compile" is eager through torch.compile.
        cuda_functions: those there are on a GPU only.
        reference: called on float64 tensors, it gives the exact results.
        count: work of (forward, backward), from the arguments of the operator.
        directions: a provider that makes gradients in forward can only be compared in "both".
    """

    functions: dict[str, Callable]
    cuda_functions: dict[str, Callable] = field(default_factory=dict)
    reference: Callable
    count: Callable[..., tuple[float, float]]
    directions: tuple[str, ...] = ("forward", "backward", "both")

    def providers_on(self, device: str) -> tuple[str, ...]:
        return (*self.functions, *(self.cuda_functions if device == "cuda" else ()), COMPILE)

    def inputs(self, case: Case, dtype: str, device: torch.device) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(BENCH_SEED)
        made = {}
        for name, draw in case.args.items():
            t = draw.make(generator).to(device)
            made[name] = t.to(DTYPES[dtype]) if draw.follows_dtype else t
        return made

    def task(self, provider: str, case: Case, inputs: dict[str, Tensor], dtype: str) -> OpTask:
        functions = self.functions | self.cuda_functions
        function = torch.compile(functions[EAGER], dynamic=False) if provider == COMPILE else functions[provider]
        return OpTask(function, inputs, self._grads(case), case.options, dtype)

    def exact(self, case: Case, inputs: dict[str, Tensor]) -> Results:
        double = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        return OpTask(self.reference, double, self._grads(case), case.options, "fp64").results()

    def work(self, case: Case, inputs: dict[str, Tensor]) -> dict[str, float]:
        return amounts(*self.count(**inputs, **case.options))

    def _grads(self, case: Case) -> list[str]:
        return [name for name, draw in case.args.items() if draw.grad]


@dataclass(frozen=True, kw_only=True)
class StepBenchmark(Benchmark):
    """Something that updates its own state, such as an optimizer or a whole training step.

    Args:
        builders: by provider: (case, inputs, dtype) to a StepTask.
        cuda_builders: those there are on a GPU only.
        make_inputs: (case, device) to whatever the builders take.
        make_exact: (case, inputs) to the results in float64.
        count: (case, inputs) to the work of a step.
    """

    builders: dict[str, Callable[[Case, Any, str], StepTask]]
    cuda_builders: dict[str, Callable[[Case, Any, str], StepTask]] = field(default_factory=dict)
    make_inputs: Callable[[Case, torch.device], Any]
    make_exact: Callable[[Case, Any], Results]
    count: Callable[[Case, Any], float]
    directions: tuple[str, ...] = ("step",)

    def providers_on(self, device: str) -> tuple[str, ...]:
        return (*self.builders, *(self.cuda_builders if device == "cuda" else ()))

    def inputs(self, case: Case, dtype: str, device: torch.device) -> Any:
        return self.make_inputs(case, device)

    def task(self, provider: str, case: Case, inputs: Any, dtype: str) -> StepTask:
        return (self.builders | self.cuda_builders)[provider](case, inputs, dtype)

    def exact(self, case: Case, inputs: Any) -> Results:
        return self.make_exact(case, inputs)

    def work(self, case: Case, inputs: Any) -> dict[str, float]:
        return {"step": self.count(case, inputs)}

"""What each operator is tested with: a file per operator holds its `SPECS`; the test modules loop over all of them."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from hypothesis.strategies import SearchStrategy
from torch import Tensor

from bigmodel_fast import ops

Layout = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Arg:
    """One tensor argument: random normal numbers of a shape, or given values (class numbers, lengths, masks)."""

    shape: tuple[int, ...] = ()
    scale: float = 1.0
    weight: bool = False  # a parameter: may stay float32 where the activations are bfloat16
    grad: bool = True
    values: Tensor | None = None

    def tensor(self, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        if self.values is not None:
            return self.values
        return (torch.randn(self.shape, generator=generator, dtype=torch.float64) * self.scale).to(dtype)


def normal(*shape: int, scale: float = 1.0) -> Arg:
    return Arg(shape, scale)


def weight(*shape: int, grad: bool = True) -> Arg:
    """A parameter, scaled as an initialisation would, so that outputs stay near 1."""
    return Arg(shape, (shape[-1] or 1) ** -0.5, weight=True, grad=grad)


def classes(*shape: int, count: int, ignored: int = 0, ignore_index: int = -100) -> Arg:
    """Class numbers, of which every `ignored`-th is the ignored one (none for 0)."""
    values = torch.randint(count, shape, generator=torch.Generator().manual_seed(count))
    if ignored:
        values.view(-1)[::ignored] = ignore_index
    return Arg(grad=False, values=values)


def fixed(values: Any, dtype: torch.dtype = torch.int64) -> Arg:
    return Arg(grad=False, values=torch.as_tensor(values, dtype=dtype))


@dataclass(frozen=True)
class Sample:
    """Arguments of one call. `covered` says whether a kernel takes it; if not, the reference does."""

    args: dict[str, Arg]
    options: dict[str, Any] = field(default_factory=dict)
    covered: bool = True

    def tensors(
        self, dtype: torch.dtype, weight_dtype: torch.dtype | None = None, layout: Layout = lambda t: t, seed: int = 0
    ) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, arg in self.args.items():
            made[name] = layout(arg.tensor((arg.weight and weight_dtype) or dtype, generator))
        return made

    @property
    def wanted(self) -> tuple[str, ...]:
        """The arguments whose gradients are compared."""
        return tuple(name for name, arg in self.args.items() if arg.grad)

    def __str__(self) -> str:
        shapes = "-".join("x".join(map(str, a.shape)) for a in self.args.values() if a.values is None)
        return "-".join([shapes, *(f"{k}={v}" for k, v in self.options.items() if not isinstance(v, Tensor))])


@dataclass(frozen=True)
class Error:
    """Arguments that replace those of the first sample, and what the message must say."""

    changes: dict[str, Any]
    type: type[Exception]
    argument: str
    got: str
    expected: str

    def __str__(self) -> str:
        return f"{self.argument}: {self.got}".replace(" ", "")


@dataclass(frozen=True)
class Spec:
    """An operator's samples (the first tiny, the last large enough for several threads) and how it is to behave."""

    name: str
    samples: tuple[Sample, ...]
    tail: Callable[[int], Sample]  # for each n: a small sample whose vectors have n elements
    empty: tuple[Sample, ...]  # some dimension is 0
    shapes: SearchStrategy[Sample]
    errors: tuple[Error, ...]
    # Under autocast: "cast" computes in its dtype, "output" casts the first output only, "keep" leaves dtypes alone.
    autocast: str
    mixed: bool = True  # takes float32 weights with bfloat16 activations
    # An input that is NaN or infinite, where the operator promises what comes out.
    special: tuple[str, ...] = ()
    plain: Callable[..., Any] | None = None
    # Its gradients are differences that may vanish, of terms as large as its other gradients: a softmax's.
    differences: bool = False

    @property
    def op(self) -> Callable[..., Any]:
        return getattr(ops, self.name)

    @property
    def reference(self) -> Callable[..., Any]:
        return self.plain or importlib.import_module(f"bigmodel_fast.ops.{self.name}").reference

    def __str__(self) -> str:
        return self.name


@cache
def all_specs() -> tuple[Spec, ...]:
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    return tuple(spec for module in modules for spec in module.SPECS)


def cases(which: str = "samples") -> list[tuple[Spec, Any]]:
    """(spec, sample) for each sample of each operator; `which` may also be "empty" or "errors"."""
    return [(spec, item) for spec in all_specs() for item in getattr(spec, which)]


def case_id(value: object) -> str:
    """The name of a parameter in pytest's output."""
    return str(value).removeprefix("torch.")

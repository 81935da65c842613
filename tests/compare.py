"""Calls an operator and its reference on the same inputs and compares outputs and gradients."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import numerics
import torch
from specs import Layout, Sample, Spec
from torch import Tensor

Outputs = tuple[Tensor, ...]


def as_tuple(outputs: Any) -> Outputs:
    return tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}


def upstream(outputs: Iterable[Tensor], layout: Layout = lambda t: t) -> Outputs:
    """A gradient for each output, the same ones for each call."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        layout(torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)) for y in outputs
    )


def forward(function: Callable, tensors: dict[str, Tensor], options: dict[str, Any]) -> Outputs:
    return as_tuple(function(**tensors, **options))


def differentiate(
    function: Callable,
    tensors: dict[str, Tensor],
    options: dict[str, Any],
    wanted: Iterable[str],
    gradients: Outputs | None = None,
    layout: Layout = lambda t: t,
    context: Any = None,
) -> tuple[Outputs, dict[str, Tensor | None]]:
    """Outputs, and the gradient of each `wanted` argument."""
    leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
    with context or nullcontext():
        outputs = forward(function, leaves, options)
    if gradients is None:
        gradients = upstream(outputs, layout)
    gradients = tuple(g.to(y.dtype) for g, y in zip(gradients, outputs, strict=True))
    inputs = [leaves[name] for name in wanted]
    made = torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
    return tuple(y.detach() for y in outputs), dict(zip(wanted, made, strict=True))


def assert_matches(
    spec: Spec,
    sample: Sample,
    tensors: dict[str, Tensor],
    *,
    layout: Layout = lambda t: t,
    eager: Callable | None = None,
    eager_context: Any = None,
    context: Any = None,
    what: str = "",
) -> None:
    """Outputs and gradients are as near to the float64 reference as the reference in the same dtype is."""
    what = f"{spec.name} {sample} {what}"
    call = (sample.options, sample.wanted)
    outputs, grads = differentiate(spec.op, tensors, *call, layout=layout, context=context)
    seeds = upstream(outputs, layout)
    eager_outputs, eager_grads = differentiate(eager or spec.reference, tensors, *call, seeds, context=eager_context)
    exact_outputs, exact_grads = differentiate(spec.reference, double(tensors), *call, seeds)
    for i, triple in enumerate(zip(outputs, eager_outputs, exact_outputs, strict=True)):
        numerics.assert_close(*triple, numerics.FORWARD, f"{what} output {i}")
    scale = max((numerics.largest(g) for g in exact_grads.values() if g is not None), default=0.0)
    for name in sample.wanted:
        assert grads[name] is not None, f"{what}: no gradient of {name}"
        triple = grads[name], eager_grads[name], exact_grads[name]
        numerics.assert_close(
            *triple, numerics.BACKWARD, f"{what} gradient of {name}", scale if spec.differences else None
        )


def assert_same(actual: Any, expected: Any, what: str) -> None:
    """The same bits, NaN included."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a.dtype, a.shape) == (e.dtype, e.shape), f"{what} {i}"
        assert torch.equal(a.nan_to_num(nan=0.25), e.nan_to_num(nan=0.25)), f"{what} {i}: other bits"
        assert torch.equal(a.isnan(), e.isnan()), f"{what} {i}: NaN elsewhere"

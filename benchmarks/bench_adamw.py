"""optim.AdamW beside torch.optim.AdamW: "eager" is its fused form, "eager default" that of a call without options."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigmodel_fast import optim

from .cases import BENCH_SEED, Case, Results, StepBenchmark, StepTask

LR, DECAY, CHECKED_STEPS = 1e-3, 0.1, 3
State = list[tuple[Tensor, Tensor]]  # parameters and their gradients


def make_inputs(case: Case, device: torch.device) -> State:
    generator = torch.Generator(device).manual_seed(BENCH_SEED)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return [(draw(shape), draw(shape)) for shape in case.options["shapes"]]


def build(optimizer: Callable, case: Case, inputs: State, dtype: str) -> StepTask:
    # Gradients are shared by all providers: no optimizer writes to them.
    parameters = [p.clone().requires_grad_() for p, _ in inputs]
    for parameter, (_, grad) in zip(parameters, inputs, strict=True):
        parameter.grad = grad
    made = optimizer(parameters, lr=LR, weight_decay=DECAY)

    def results() -> Results:
        for _ in range(CHECKED_STEPS):
            made.step()
        return {f"parameter {i}": p.detach().clone() for i, p in enumerate(parameters)}

    return StepTask(made.step, results)


def exact(case: Case, inputs: State) -> Results:
    """One parameter after the other: states in float64 of all of them would fill a GPU."""
    found = {}
    for i, (p, g) in enumerate(inputs):
        (found[f"parameter {i}"],) = (
            build(torch.optim.AdamW, case, [(p.double(), g.double())], "fp64").results().values()
        )
    return found


def step_bytes(case: Case, inputs: State) -> float:
    """Parameter, gradient and both moments are read; all but the gradient are written."""
    return sum(7.0 * p.nbytes for p, _ in inputs)


def gpt_shapes(vocab: int, context: int, width: int, layers: int) -> Iterator[tuple[int, ...]]:
    """Of the parameters of a GPT-2: what an optimizer meets in practice, large and tiny ones mixed."""
    yield from ((vocab, width), (context, width), (width,), (width,))
    for _ in range(layers):
        for out, into in ((3 * width, width), (width, width), (4 * width, width), (width, 4 * width)):
            yield from ((out, into), (out,))
        yield from ((width,),) * 4


def llama_shapes(vocab: int, width: int, hidden: int, layers: int) -> Iterator[tuple[int, ...]]:
    """Of the parameters of a Llama with as many key heads as heads."""
    yield from ((vocab, width), (width,))
    for _ in range(layers):
        yield from (*((width, width),) * 4, *((hidden, width),) * 2, (width, hidden), (width,), (width,))


def case(name: str, *shapes: tuple[int, ...], **how: Any) -> Case:
    return Case(name, options={"shapes": shapes}, dtypes=("fp32",), **how)


BENCHMARK = StepBenchmark(
    name="adamw",
    unit="B",
    builders={
        "bigmodel_fast": partial(build, optim.AdamW),
        "eager": partial(build, partial(torch.optim.AdamW, fused=True)),
        "eager default": partial(build, torch.optim.AdamW),
    },
    make_inputs=make_inputs,
    make_exact=exact,
    count=step_bytes,
    cases=(
        case("gpt 11M, 76 tensors", *gpt_shapes(65, 256, 384, 6), quick=True),
        case("gpt 67M, 52 tensors", *gpt_shapes(50304, 512, 768, 4)),
        case("1000 tensors of 100", *((100,),) * 1000),
        case("one of 333x517", (333, 517)),
    ),
    cuda_cases=(
        case("gpt2 124M, 148 tensors", *gpt_shapes(50304, 1024, 768, 12), quick=True),
        case("llama 1.03B, 164 tensors", *llama_shapes(50304, 2048, 5632, 18)),
        case("10000 tensors of 100", *((100,),) * 10000),
    ),
    tiny=case("tiny", (3, 5), (7,)),
)

"""train.MLPTrainer beside an eager loop over the same arrays in memory.

A step is a number of optimizer steps (SGD at 0.01) on batches of stored bytes: "eager" gathers a batch from a tensor of
normalised floats, runs torch.nn.Linear and ReLU modules, loss, backward and the optimizer, as people write it.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel_fast.data import ArrayLoader
from bigmodel_fast.models import MLP
from bigmodel_fast.train import MLPTrainer

from .cases import BENCH_SEED, Case, Results, StepBenchmark, StepTask, autocast

LR, MEAN, STD = 0.01, 0.5, 0.5


@dataclass
class Inputs:
    model: MLP
    x: Tensor  # [N, features], bytes
    y: Tensor
    order: Tensor  # of the samples of a step


def make_inputs(case: Case, device: torch.device) -> Inputs:
    sizes, batch, steps = (case.options[name] for name in ("sizes", "batch", "steps"))
    generator = torch.Generator().manual_seed(BENCH_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BENCH_SEED)
        model = MLP(sizes)
    n = batch * steps
    x = torch.randint(256, (n, sizes[0]), generator=generator, dtype=torch.uint8)
    y = torch.randint(sizes[-1], (n,), generator=generator)
    return Inputs(model, x, y, torch.randperm(n, generator=generator))


def eager_steps(model: nn.Module, x: Tensor, inputs: Inputs, batch: int, dtype: str) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for picked in inputs.order.split(batch):
        optimizer.zero_grad()
        with autocast(dtype, x.device):
            loss = F.cross_entropy(model(x[picked]), inputs.y[picked])
        loss.backward()
        optimizer.step()


def normalised(inputs: Inputs, dtype: torch.dtype = torch.float32) -> Tensor:
    return (inputs.x.to(dtype) / 255 - MEAN) / STD


def parameters_after(model: nn.Module) -> Results:
    return {f"parameter {name}": p.detach().clone() for name, p in model.named_parameters()}


def build_eager(case: Case, inputs: Inputs, dtype: str) -> StepTask:
    model, x = nn.Sequential(*copy.deepcopy(inputs.model)), normalised(inputs)

    def step() -> None:
        eager_steps(model, x, inputs, case.options["batch"], dtype)

    def results() -> Results:
        step()
        return parameters_after(model)

    return StepTask(step, results)


def build_ours(case: Case, inputs: Inputs, dtype: str) -> StepTask:
    model = copy.deepcopy(inputs.model)
    trainer = MLPTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=LR), dtype=dtype)
    loader = ArrayLoader(inputs.x, inputs.y, batch_size=case.options["batch"], mean=MEAN, std=STD)

    def step() -> None:
        trainer.epoch(loader, order=inputs.order)

    def results() -> Results:
        step()
        return parameters_after(model)

    return StepTask(step, results)


def exact(case: Case, inputs: Inputs) -> Results:
    model = nn.Sequential(*copy.deepcopy(inputs.model)).double()
    eager_steps(model, normalised(inputs, torch.float64), inputs, case.options["batch"], "fp64")
    return parameters_after(model)


def flops(case: Case, inputs: Inputs) -> float:
    """Two for each weight and sample in forward, wgrad and, but for the first layer, dgrad."""
    weights = [p.numel() for p in inputs.model.parameters() if p.dim() == 2]
    return (6.0 * sum(weights) - 2.0 * weights[0]) * len(inputs.x)


def case(sizes: tuple[int, ...], batch: int, steps: int, **how: Any) -> Case:
    options = {"sizes": sizes, "batch": batch, "steps": steps}
    return Case(f"{'-'.join(map(str, sizes))}, batch {batch}, {steps} steps", options=options, **how)


DIGITS, WIDE = (784, 128, 64, 10), (784, 1024, 1024, 10)

BENCHMARK = StepBenchmark(
    name="mlp_trainer",
    unit="FLOP",
    builders={"bigmodel_fast": build_ours, "eager": build_eager},
    make_inputs=make_inputs,
    make_exact=exact,
    count=flops,
    cases=(
        case(DIGITS, 64, 200, quick=True),
        case(DIGITS, 16, 200, quick=True),
        case(DIGITS, 256, 100),
        case(DIGITS, 4096, 8),
        case(WIDE, 16, 20),
        case(WIDE, 64, 20),
        case(WIDE, 256, 10),
        case(WIDE, 4096, 2),
        case((30, 16, 2), 16, 200),
    ),
    cuda_cases=(),  # the trainer's kernels are the CPU's
    tiny=case((12, 9, 5), 7, 3),
)

"""Forward and backward of models.MLP with narrow layers, beside torch.nn modules.

"native" is the whole network in one CUDA C++ kernel, where this build has them; "bigmodel_fast" goes layer by layer.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel_fast import _dispatch
from bigmodel_fast.models import MLP
from bigmodel_fast.ops import _cuda

from .cases import BENCH_SEED, Case, Results, StepBenchmark, StepTask, autocast

WIDE, WIDER = (32, 64, 64, 64, 64, 16), (32, 128, 128, 128, 128, 16)


@dataclass
class Inputs:
    model: MLP
    x: Tensor  # [rows, sizes[0]]
    grad: Tensor  # of the output


def make_inputs(case: Case, device: torch.device) -> Inputs:
    sizes, rows = case.options["sizes"], case.options["rows"]
    generator = torch.Generator().manual_seed(BENCH_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BENCH_SEED)
        model = MLP(sizes, activation=case.options["activation"]).to(device)
    x, grad = (torch.randn(rows, n, generator=generator).bfloat16().float().to(device) for n in (sizes[0], sizes[-1]))
    return Inputs(model, x, grad)


def task(model: nn.Module, inputs: Inputs, dtype: str, backend: str | None = None) -> StepTask:
    own = next(model.parameters())
    x = inputs.x.to(torch.bfloat16 if dtype == "bf16" else own.dtype)

    def step() -> Results:
        model.zero_grad()
        with _dispatch.forcing(backend or _dispatch._forced):
            with autocast(dtype, x.device):
                y = model(x)
            y.backward(inputs.grad.to(y.dtype))
        return {"output": y.detach()} | {f"grad {name}": p.grad for name, p in model.named_parameters()}

    return StepTask(step, lambda: {name: t.clone() for name, t in step().items()})


def build_ours(case: Case, inputs: Inputs, dtype: str) -> StepTask:
    return task(copy.deepcopy(inputs.model), inputs, dtype)


def build_native(case: Case, inputs: Inputs, dtype: str) -> StepTask:
    return task(copy.deepcopy(inputs.model), inputs, dtype, "native")


def build_eager(case: Case, inputs: Inputs, dtype: str) -> StepTask:
    return task(nn.Sequential(*copy.deepcopy(inputs.model)), inputs, dtype)


def build_compile(case: Case, inputs: Inputs, dtype: str) -> StepTask:
    model = nn.Sequential(*copy.deepcopy(inputs.model))
    model.compile(dynamic=False)
    return task(model, inputs, dtype)


def exact(case: Case, inputs: Inputs) -> Results:
    return task(nn.Sequential(*copy.deepcopy(inputs.model)).double(), inputs, "fp64").results()


def flops(case: Case, inputs: Inputs) -> float:
    """Two for each weight and row in forward, wgrad and, but for the first layer, dgrad."""
    weights = [p.numel() for p in inputs.model.parameters() if p.dim() == 2]
    return (6.0 * sum(weights) - 2.0 * weights[0]) * len(inputs.x)


def case(sizes: tuple[int, ...], rows: int, activation: str = "relu", **how: Any) -> Case:
    options = {"sizes": sizes, "rows": rows, "activation": activation}
    return Case(f"{'-'.join(map(str, sizes))} {activation}, {rows} rows", options=options, **how)


BENCHMARK = StepBenchmark(
    name="mlp_fused",
    unit="FLOP",
    builders={"bigmodel_fast": build_ours, "eager": build_eager, "compile": build_compile},
    cuda_builders={"native": build_native} if _cuda.BUILT else {},
    make_inputs=make_inputs,
    make_exact=exact,
    count=flops,
    cases=(case(WIDE, 1 << 14, quick=True, compiled=("bf16",)),),
    cuda_cases=(
        case(WIDE, 1 << 18, quick=True, compiled=("bf16",), dtypes=("bf16",)),
        case(WIDE, 1 << 18, "gelu", dtypes=("bf16",)),
        case(WIDER, 1 << 18, compiled=("bf16",), dtypes=("bf16",)),
        case((3, 64, 64, 3), 1 << 20, dtypes=("bf16",)),
    ),
    tiny=case((5, 64, 64, 3), 7),
)

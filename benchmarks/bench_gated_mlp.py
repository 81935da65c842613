"""gated_mlp (SwiGLU) beside three F.linear, and on a GPU beside Liger's, where that is installed."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bigmodel_fast import ops
from bigmodel_fast.ops.gated_mlp import reference

from .cases import Case, OpBenchmark, installed, native, normal, weight


def eager(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, w_gate)) * F.linear(x, w_up), w_down)


def liger(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return F.linear(liger_swiglu(F.linear(x, w_gate), F.linear(x, w_up)), w_down)


def flops(x: Tensor, w_gate: Tensor, **_: Any) -> tuple[float, float]:
    """Three products in forward, six in backward."""
    forward = 6.0 * x.numel() * w_gate.shape[0]
    return forward, 2 * forward


def case(rows: int, width: int, hidden: int, **how: Any) -> Case:
    args = {
        "x": normal(rows, width),
        "w_gate": weight(hidden, width),
        "w_up": weight(hidden, width),
        "w_down": weight(width, hidden),
    }
    return Case(f"{rows}x{width}x{hidden}", args, **how)


BENCHMARK = OpBenchmark(
    name="gated_mlp",
    unit="FLOP",
    functions={"bigmodel_fast": ops.gated_mlp, "eager": eager},
    cuda_functions=native(ops.gated_mlp) | ({"liger": liger} if installed("liger_kernel") else {}),
    reference=reference,
    count=flops,
    cases=(
        case(4096, 768, 2048, compiled=("bf16",)),
        case(4096, 384, 1024, quick=True),
        case(512, 768, 2048),
        case(300, 333, 1021),
        case(1, 768, 2048),
    ),
    cuda_cases=(
        case(8192, 4096, 14336, quick=True, compiled=("bf16",), dtypes=("bf16",)),
        case(16384, 2048, 5632, dtypes=("bf16",)),
        case(64, 4096, 14336, dtypes=("bf16",)),
    ),
    tiny=case(5, 7, 9),
)

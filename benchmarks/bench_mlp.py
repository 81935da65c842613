"""mlp beside two F.linear with F.gelu between them; "native" is that of CUDA C++, where this build has it.

The products of its first case for a GPU alone are two cases of the table of linear.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bigmodel_fast import ops
from bigmodel_fast.ops._activation import activate
from bigmodel_fast.ops.mlp import reference

from .cases import Case, OpBenchmark, native, normal, weight


def eager(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, activation: str) -> Tensor:
    return F.linear(activate(F.linear(x, w1, b1), activation), w2, b2)


def flops(x: Tensor, w1: Tensor, w2: Tensor, **_: Any) -> tuple[float, float]:
    """Two products in forward, four in backward."""
    forward = 2.0 * (x.numel() // x.shape[-1]) * (w1.numel() + w2.numel())
    return forward, 2 * forward


def case(rows: int, width: int, hidden: int, activation: str = "gelu", **how: Any) -> Case:
    args = {
        "x": normal(rows, width),
        "w1": weight(hidden, width),
        "b1": weight(hidden),
        "w2": weight(width, hidden),
        "b2": weight(width),
    }
    return Case(f"{rows}x{width}x{hidden} {activation}", args, {"activation": activation}, **how)


BENCHMARK = OpBenchmark(
    name="mlp",
    unit="FLOP",
    functions={"bigmodel_fast": ops.mlp, "eager": eager},
    cuda_functions=native(ops.mlp),
    reference=reference,
    count=flops,
    cases=(
        case(4096, 768, 3072, compiled=("bf16",)),
        case(4096, 384, 1536, "gelu_tanh", quick=True),
        case(512, 768, 3072, "relu"),
        case(300, 333, 1021),
        case(1, 768, 3072),
    ),
    cuda_cases=(
        case(8192, 4096, 16384, quick=True, compiled=("bf16",), dtypes=("bf16",)),
        case(8192, 4096, 16384, "gelu_tanh", dtypes=("bf16",)),
        case(65536, 768, 3072, "gelu_tanh", dtypes=("bf16",)),
        case(8192, 2048, 8192, "relu2", dtypes=("bf16",)),
        case(64, 4096, 16384, dtypes=("bf16",)),
    ),
    tiny=case(5, 7, 9),
)

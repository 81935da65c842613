"""dropout beside F.dropout, alone and with a residual added."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bigmodel_fast import ops

from .cases import Case, OpBenchmark, normal, stream


def ours(x: Tensor, dropout_p: float, residual: Tensor | None = None) -> Tensor:
    return ops.dropout(x, dropout_p, residual=residual)


def eager(x: Tensor, dropout_p: float, residual: Tensor | None = None) -> Tensor:
    x = F.dropout(x, dropout_p)
    return x if residual is None else residual + x


def count(x: Tensor, dropout_p: float, residual: Tensor | None = None) -> tuple[float, float]:
    """Bytes that must be read and written, forward and backward."""
    if residual is None:
        return 2.0 * x.nbytes, 2.0 * x.nbytes
    return x.nbytes + 2.0 * residual.nbytes, residual.nbytes + 1.0 * x.nbytes


def case(rows: int, width: int, residual: bool = False, **how: Any) -> Case:
    args = {"x": normal(rows, width)}
    if residual:
        args["residual"] = stream(rows, width)
    return Case(f"{rows}x{width}{' + residual' if residual else ''}", args, {"dropout_p": 0.1}, **how)


BENCHMARK = OpBenchmark(
    name="dropout",
    unit="B",
    functions={"bigmodel_fast": ours, "eager": eager},
    reference=eager,
    count=count,
    cases=(
        case(8192, 768, compiled=("bf16",)),
        case(8192, 768, residual=True, quick=True, compiled=("bf16",)),
        case(2048, 4096),
        case(1000, 333, residual=True),
        case(1, 768),
    ),
    cuda_cases=(
        case(16384, 4096, quick=True, compiled=("bf16",), dtypes=("bf16",)),
        case(16384, 4096, residual=True, compiled=("bf16",), dtypes=("bf16",)),
    ),
    tiny=case(5, 7, residual=True),
)

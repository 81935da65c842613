"""rms_norm beside F.rms_norm, with and without a residual added first."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bigmodel_fast import ops
from bigmodel_fast.ops.rms_norm import reference

from .bench_layer_norm import norm_bytes
from .cases import Case, OpBenchmark, normal, stream, weight

EPS = 1e-6


def eager(x: Tensor, weight: Tensor, *, residual: Tensor | None = None):
    if residual is None:
        return F.rms_norm(x, (x.shape[-1],), weight, EPS)
    total = residual + x
    return F.rms_norm(total, (x.shape[-1],), weight, EPS), total


def case(rows: int, width: int, residual: bool = False, **how: Any) -> Case:
    args = {"x": normal(rows, width), "weight": weight(width)}
    if residual:
        args["residual"] = stream(rows, width)
    return Case(f"{rows}x{width}{' + residual' if residual else ''}", args, **how)


BENCHMARK = OpBenchmark(
    name="rms_norm",
    unit="B",
    functions={"bigmodel_fast": ops.rms_norm, "eager": eager},
    reference=reference,
    count=norm_bytes,
    cases=(
        case(8192, 768, compiled=("bf16",)),
        case(8192, 768, residual=True, quick=True, compiled=("bf16",)),
        case(2048, 4096),
        case(4096, 384, residual=True),
        case(1000, 333),
        case(1, 768),
    ),
    tiny=case(5, 7, residual=True),
)

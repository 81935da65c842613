"""rms_norm beside F.rms_norm, with and without a residual added first; on a GPU beside Liger's, if installed."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bigmodel_fast import ops
from bigmodel_fast.ops.rms_norm import reference

from .bench_layer_norm import norm_bytes
from .cases import Case, OpBenchmark, installed, normal, stream, weight

EPS = 1e-6


def eager(x: Tensor, weight: Tensor, *, residual: Tensor | None = None):
    if residual is None:
        return F.rms_norm(x, (x.shape[-1],), weight, EPS)
    total = residual + x
    return F.rms_norm(total, (x.shape[-1],), weight, EPS), total


def liger(x: Tensor, weight: Tensor, *, residual: Tensor | None = None):
    from liger_kernel.transformers.functional import liger_rms_norm

    total = x if residual is None else residual + x
    # Not in place: it would write into the gradient that the other providers get too.
    y = liger_rms_norm(total, weight, EPS, in_place=False)
    return y if residual is None else (y, total)


def case(rows: int, width: int, residual: bool = False, **how: Any) -> Case:
    args = {"x": normal(rows, width), "weight": weight(width)}
    if residual:
        args["residual"] = stream(rows, width)
    return Case(f"{rows}x{width}{' + residual' if residual else ''}", args, **how)


BENCHMARK = OpBenchmark(
    name="rms_norm",
    unit="B",
    functions={"bigmodel_fast": ops.rms_norm, "eager": eager},
    cuda_functions={"liger": liger} if installed("liger_kernel") else {},
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
    cuda_cases=(
        case(16384, 4096, quick=True, compiled=("bf16",), dtypes=("bf16",)),
        case(16384, 4096, residual=True, compiled=("bf16",), dtypes=("bf16",)),
        case(65536, 768, residual=True, dtypes=("bf16",)),
        case(4096, 16384, dtypes=("bf16",)),
        case(16384, 1000),
    ),
    tiny=case(5, 7, residual=True),
)

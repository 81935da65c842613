"""layer_norm beside F.layer_norm, with and without a residual added first; on a GPU beside Liger's, if installed."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bigmodel_fast import ops
from bigmodel_fast.ops.layer_norm import reference

from .cases import Case, OpBenchmark, installed, normal, stream, weight


def eager(x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor | None = None):
    if residual is None:
        return F.layer_norm(x, (x.shape[-1],), weight, bias)
    total = residual + x
    return F.layer_norm(total, (x.shape[-1],), weight, bias), total


def liger(x: Tensor, weight: Tensor, bias: Tensor, *, residual: Tensor | None = None):
    from liger_kernel.transformers.functional import liger_layer_norm

    if residual is None:
        return liger_layer_norm(x, weight, bias, 1e-5)
    total = residual + x
    return liger_layer_norm(total, weight, bias, 1e-5), total


def case(rows: int, width: int, residual: bool = False, **how: Any) -> Case:
    args = {"x": normal(rows, width), "weight": weight(width), "bias": weight(width)}
    if residual:
        args["residual"] = stream(rows, width)
    return Case(f"{rows}x{width}{' + residual' if residual else ''}", args, **how)


def norm_bytes(x: Tensor, residual: Tensor | None = None, **_: Any) -> tuple[float, float]:
    """Forward reads x and writes y; backward reads x and dy and writes dx. A residual adds its own reads and writes."""
    if residual is None:
        return 2.0 * x.nbytes, 3.0 * x.nbytes
    return 2.0 * (x.nbytes + residual.nbytes), 2.0 * x.nbytes + 3.0 * residual.nbytes


CASES = (
    case(8192, 768, compiled=("bf16",)),
    case(8192, 768, residual=True, quick=True, compiled=("bf16",)),
    case(2048, 4096),
    case(4096, 384, residual=True),
    case(1000, 333),
    case(1, 768),
)

CUDA_CASES = (
    case(16384, 4096, quick=True, compiled=("bf16",), dtypes=("bf16",)),
    case(16384, 4096, residual=True, compiled=("bf16",), dtypes=("bf16",)),
    case(65536, 768, residual=True, dtypes=("bf16",)),
    case(4096, 16384, dtypes=("bf16",)),
    case(16384, 1000),
)

BENCHMARK = OpBenchmark(
    name="layer_norm",
    unit="B",
    functions={"bigmodel_fast": ops.layer_norm, "eager": eager},
    cuda_functions={"liger": liger} if installed("liger_kernel") else {},
    reference=reference,
    count=norm_bytes,
    cases=CASES,
    cuda_cases=CUDA_CASES,
    tiny=case(5, 7, residual=True),
)

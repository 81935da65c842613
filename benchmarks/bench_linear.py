"""linear beside F.linear and the activation after it."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bigmodel_fast import ops
from bigmodel_fast.ops._activation import activate
from bigmodel_fast.ops.linear import reference

from .cases import Case, OpBenchmark, normal, weight


def eager(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None) -> Tensor:
    return activate(F.linear(x, weight, bias), activation)


def flops(x: Tensor, weight: Tensor, **_: Any) -> tuple[float, float]:
    """One product in forward, two in backward."""
    forward = 2.0 * x.numel() * weight.shape[0]
    return forward, 2 * forward


def case(rows: int, k: int, n: int, activation: str | None = None, quick: bool = False, **how: Any) -> Case:
    name = f"{rows}x{k} to {n}{' ' + activation if activation else ''}"
    args = {"x": normal(rows, k), "weight": weight(n, k), "bias": weight(n)}
    return Case(name, args, {"activation": activation}, quick, **how)


def product(rows: int, k: int, n: int) -> Case:
    """A product and its gradients with nothing around them: eager is cuBLAS alone."""
    return Case(f"{rows}x{k} to {n} alone", {"x": normal(rows, k), "weight": normal(n, k)}, dtypes=("bf16",))


BENCHMARK = OpBenchmark(
    name="linear",
    unit="FLOP",
    functions={"bigmodel_fast": ops.linear, "eager": eager},
    reference=reference,
    count=flops,
    cases=(
        case(4096, 768, 2304),
        case(4096, 384, 1152),
        case(2048, 768, 768, quick=True),
        case(2048, 768, 3072, "gelu"),
        case(512, 1024, 1024),
        case(300, 333, 517),
        case(1, 768, 2304),
    ),
    cuda_cases=(
        case(8192, 4096, 12288, quick=True, dtypes=("bf16",)),
        case(65536, 768, 2304, dtypes=("bf16",)),
        case(8192, 4096, 16384, "gelu", dtypes=("bf16",)),
        case(64, 4096, 4096, dtypes=("bf16",)),
        product(8192, 4096, 16384),  # these two are the products of mlp's first case
        product(8192, 16384, 4096),
    ),
    tiny=case(5, 7, 9, "gelu"),
)

"""linear_cross_entropy beside F.cross_entropy of F.linear, and F.linear_cross_entropy where torch has it.

Only forward and backward together are reported: ours makes the gradients in forward, while the logits are there.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_fast import ops
from bigmodel_fast.ops.linear_cross_entropy import reference

from .cases import Case, OpBenchmark, classes, normal, weight


def eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def chunked(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """torch documents `options` as what turns chunking on; their defaults are chosen for the device and dtype."""
    return F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def flops(x: Tensor, weight: Tensor, **_: Any) -> tuple[float, float]:
    """One product in forward, two in backward."""
    forward = 2.0 * x.numel() * weight.shape[0]
    return forward, 2 * forward


def case(tokens: int, width: int, count: int, **how: Any) -> Case:
    args = {"x": normal(tokens, width), "weight": weight(count, width), "target": classes(tokens, count=count)}
    return Case(f"{tokens}x{width}x{count}", args, **how)


def functions() -> dict[str, Callable]:
    found = {"bigmodel_fast": ops.linear_cross_entropy, "eager": eager}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy"] = chunked
    return found


BENCHMARK = OpBenchmark(
    name="linear_cross_entropy",
    unit="FLOP",
    functions=functions(),
    reference=reference,
    count=flops,
    directions=("both",),
    cases=(
        case(2048, 768, 50304),
        case(1024, 384, 8192, quick=True),
        case(4096, 384, 65),
        case(333, 100, 10007),
        case(1, 768, 50304),
    ),
    tiny=case(5, 7, 11),
)

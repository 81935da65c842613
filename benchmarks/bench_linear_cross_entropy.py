"""linear_cross_entropy beside F.cross_entropy of F.linear, and F.linear_cross_entropy where torch has it.

On a GPU Liger's and Apple's (cut_cross_entropy) take part where they are installed.

Only forward and backward together are reported: ours makes the gradients in forward, while the logits are there.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bigmodel_fast import ops
from bigmodel_fast.ops.linear_cross_entropy import reference

from .cases import Case, OpBenchmark, classes, installed, normal, weight

ROWS = 1024  # of tokens whose exact logits are held at once


def eager(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def chunked(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """torch documents `options` as what turns chunking on; their defaults are chosen for the device and dtype."""
    return F.linear_cross_entropy(x, weight, target, options=torch.nn.LinearCrossEntropyOptions())


def liger(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(x, weight, target)


def cut(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight.to(x.dtype), target)


def by_rows(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The reference for some tokens after the others, again in backward, so that few logits are held at a time."""
    total = x.new_zeros(())
    options: Any = {"use_reentrant": False, "preserve_rng_state": False}
    for rows, wanted in zip(x.split(ROWS), target.split(ROWS), strict=True):
        total = total + checkpoint(reference, rows, weight, wanted, reduction="sum", **options)
    return total / len(target)


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


def cuda_functions() -> dict[str, Callable]:
    known = {"liger": ("liger_kernel", liger), "cut_cross_entropy": ("cut_cross_entropy", cut)}
    return {name: function for name, (package, function) in known.items() if installed(package)}


BENCHMARK = OpBenchmark(
    name="linear_cross_entropy",
    unit="FLOP",
    functions=functions(),
    cuda_functions=cuda_functions(),
    reference=by_rows,
    count=flops,
    directions=("both",),
    cases=(
        case(2048, 768, 50304),
        case(1024, 384, 8192, quick=True),
        case(4096, 384, 65),
        case(333, 100, 10007),
        case(1, 768, 50304),
    ),
    cuda_cases=(
        case(8192, 4096, 128256, quick=True, dtypes=("bf16",)),
        case(16384, 768, 50304, compiled=("bf16",), dtypes=("bf16",)),
        case(8192, 2048, 32000, dtypes=("bf16",)),
        case(16384, 768, 256, dtypes=("bf16",)),
    ),
    tiny=case(5, 7, 11),
)

"""cross_entropy beside F.cross_entropy."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bigmodel_fast import ops
from bigmodel_fast.ops.cross_entropy import reference

from .cases import Case, OpBenchmark, classes, normal


def case(rows: int, count: int, **how: Any) -> Case:
    return Case(f"{rows}x{count}", {"logits": normal(rows, count), "target": classes(rows, count=count)}, **how)


def logits_bytes(logits: Tensor, **_: Any) -> tuple[float, float]:
    """Forward reads the logits; backward reads them again and writes their gradient."""
    return 1.0 * logits.nbytes, 2.0 * logits.nbytes


def eager(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target)


BENCHMARK = OpBenchmark(
    name="cross_entropy",
    unit="B",
    functions={"bigmodel_fast": ops.cross_entropy, "eager": eager},
    reference=reference,
    count=logits_bytes,
    cases=(
        case(2048, 50304, compiled=("bf16",)),
        case(512, 50304, quick=True),
        case(4096, 65),
        case(8192, 1000),
        case(333, 10007),
        case(1, 50304),
    ),
    cuda_cases=(
        case(8192, 50304, quick=True, compiled=("bf16",), dtypes=("bf16",)),
        case(4096, 128256, compiled=("bf16",), dtypes=("bf16",)),
        case(32768, 1000),
    ),
    tiny=case(5, 11),
)

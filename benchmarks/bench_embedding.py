"""embedding beside F.embedding; its gradient is that of the whole table."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bigmodel_fast import ops
from bigmodel_fast.ops.embedding import reference

from .cases import Case, OpBenchmark, classes, weight


def eager(token: Tensor, weight: Tensor) -> Tensor:
    return F.embedding(token, weight)


def moved(token: Tensor, weight: Tensor) -> tuple[float, float]:
    """Rows read and written in forward; in backward gradients read, and each row of the table written."""
    rows = token.numel() * weight.shape[1] * weight.element_size()
    return 2.0 * rows, rows + float(weight.numel() * weight.element_size())


def case(tokens: int, count: int, width: int, quick: bool = False, **how: Any) -> Case:
    args = {"token": classes(tokens, count=count), "weight": weight(count, width)}
    return Case(f"{tokens} of {count}x{width}", args, quick=quick, **how)


BENCHMARK = OpBenchmark(
    name="embedding",
    unit="B",
    functions={"bigmodel_fast": ops.embedding, "eager": eager},
    reference=reference,
    count=moved,
    cases=(case(2048, 50304, 768, quick=True), case(4096, 65, 384), case(16384, 32000, 333), case(1, 50304, 768)),
    cuda_cases=(case(65536, 50304, 768, quick=True, dtypes=("bf16",)), case(16384, 128256, 4096, dtypes=("bf16",))),
    tiny=case(9, 7, 5),
)

"""rotary beside the usual chunk, negate and concatenate."""

from typing import Any

import torch
from torch import Tensor

from bigmodel_fast import ops
from bigmodel_fast.ops.rotary import reference

from .baseline_gpt import rotate
from .cases import Case, Draw, OpBenchmark, projected, values


def eager(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(query, cos, sin), rotate(key, cos, sin)


def table(length: int, dim: int, function: Any) -> Draw:
    """cos or sin of the angle of each position and pair, [S, D]."""
    frequency = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return values(lambda: function(torch.cat([angle, angle], dim=1)).float())


def case(b: int, heads: int, kv_heads: int, s: int, d: int, **how: Any) -> Case:
    args = {
        "query": projected(b, heads, s, d),
        "key": projected(b, kv_heads, s, d),
        "cos": table(s, d, torch.cos),
        "sin": table(s, d, torch.sin),
    }
    return Case(f"{b}x{heads}/{kv_heads}x{s}x{d}", args, **how)


def rotary_bytes(query: Tensor, key: Tensor, **_: Any) -> tuple[float, float]:
    """Both are read and written, in forward as in backward."""
    passed = 2.0 * (query.nbytes + key.nbytes)
    return passed, passed


BENCHMARK = OpBenchmark(
    name="rotary",
    unit="B",
    functions={"bigmodel_fast": ops.rotary, "eager": eager},
    reference=reference,
    count=rotary_bytes,
    cases=(
        case(4, 12, 12, 512, 64, quick=True, compiled=("bf16",)),
        case(16, 6, 6, 256, 64),
        case(1, 32, 8, 2048, 128),
        case(3, 5, 1, 77, 80),
        case(1, 12, 12, 1, 64),
    ),
    cuda_cases=(
        case(4, 32, 8, 4096, 128, quick=True, compiled=("bf16",), dtypes=("bf16",)),
        case(16, 12, 12, 1024, 64, dtypes=("bf16",)),
    ),
    tiny=case(2, 4, 2, 5, 8),
)

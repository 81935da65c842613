"""attention_varlen beside scaled_dot_product_attention, called for one sequence after the other."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_fast import ops
from bigmodel_fast.ops.attention_varlen import reference

from .cases import Case, OpBenchmark, normal, values


def eager(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, is_causal: bool
) -> Tensor:
    parts = []
    for begin, end in pairwise(cu_seqlens_q.tolist()):
        q, k, v = (t[begin:end].transpose(0, 1)[None] for t in (query, key, value))
        parts.append(F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)[0].transpose(0, 1))
    return torch.cat(parts)


def flops(query: Tensor, cu_seqlens_q: Tensor, *, is_causal: bool, **_: Any) -> tuple[float, float]:
    """Two products over the pairs that may meet in forward, five in backward."""
    lengths = cu_seqlens_q.diff().double()
    pairs = (lengths * (lengths + 1) / 2 if is_causal else lengths**2).sum().item()
    return 4.0 * pairs * query[0].numel(), 10.0 * pairs * query[0].numel()


def case(name: str, lengths: list[int], heads: int, dim: int, is_causal: bool = True, quick: bool = False) -> Case:
    args = {name: normal(sum(lengths), heads, dim) for name in ("query", "key", "value")}
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    args |= {name: values(lambda: bounds) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    mask = "causal" if is_causal else "full"
    return Case(f"{mask}, {name}, {heads}x{dim}", args, {"is_causal": is_causal}, quick)


BENCHMARK = OpBenchmark(
    name="attention_varlen",
    unit="FLOP",
    functions={"bigmodel_fast": ops.attention_varlen, "eager": eager},
    reference=reference,
    count=flops,
    cases=(
        case("32 of 32 to 125", list(range(32, 128, 3)), 12, 64, is_causal=False, quick=True),
        case("16 of 64 to 514", list(range(64, 544, 30)), 6, 64),
        case("1 of 2048 and 64 of 9", [2048, *[9] * 64], 4, 128),
        case("3 of 1", [1] * 3, 12, 64),
    ),
    tiny=case("tiny", [3, 1, 4], 2, 8),
)

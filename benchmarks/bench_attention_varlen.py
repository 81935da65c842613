"""attention_varlen beside scaled_dot_product_attention, called for one sequence after the other.

On a GPU, torch's own attention for packed sequences (FlashAttention) takes part where torch has it.
"""

import importlib
import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_fast import ops

from .bench_attention import by_head
from .cases import Case, OpBenchmark, installed, normal, values


def each(function: Any, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, is_causal: bool) -> Tensor:
    """An attention of [1, H, S, D] for one sequence after the other."""
    parts = []
    for begin, end in pairwise(bounds.tolist()):
        q, k, v = (t[begin:end].transpose(0, 1)[None] for t in (query, key, value))
        parts.append(function(q, k, v, is_causal=is_causal)[0].transpose(0, 1))
    return torch.cat(parts)


def eager(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, is_causal: bool, **_: Any
) -> Tensor:
    return each(F.scaled_dot_product_attention, query, key, value, cu_seqlens_q, is_causal)


def reference(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *, is_causal: bool, **_: Any
) -> Tensor:
    return each(by_head, query, key, value, cu_seqlens_q, is_causal)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool,
) -> Tensor:
    """torch.nn.attention.varlen; it knows nothing of autocast, and its option for causal has changed its name."""
    function: Any = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    causal: dict[str, Any] = {"window_size": (-1, 0 if is_causal else -1)}
    if "is_causal" in inspect.signature(function).parameters:
        causal = {"is_causal": is_causal}
    bounds = (cu_seqlens_q.int(), cu_seqlens_k.int(), max_seqlen_q, max_seqlen_k)
    return function(query, key, value, *bounds, **causal)


def flops(query: Tensor, cu_seqlens_q: Tensor, *, is_causal: bool, **_: Any) -> tuple[float, float]:
    """Two products over the pairs that may meet in forward, five in backward."""
    lengths = cu_seqlens_q.diff().double()
    pairs = (lengths * (lengths + 1) / 2 if is_causal else lengths**2).sum().item()
    return 4.0 * pairs * query[0].numel(), 10.0 * pairs * query[0].numel()


def case(name: str, lengths: list[int], heads: int, dim: int, is_causal: bool = True, **how: Any) -> Case:
    args = {name: normal(sum(lengths), heads, dim) for name in ("query", "key", "value")}
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    args |= {name: values(lambda: bounds) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    mask = "causal" if is_causal else "full"
    longest = {"max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    return Case(f"{mask}, {name}, {heads}x{dim}", args, {"is_causal": is_causal, **longest}, **how)


BENCHMARK = OpBenchmark(
    name="attention_varlen",
    unit="FLOP",
    functions={"bigmodel_fast": ops.attention_varlen, "eager": eager},
    cuda_functions={"varlen_attn": varlen_attn} if installed("torch.nn.attention.varlen") else {},
    reference=reference,
    count=flops,
    cases=(
        case("32 of 32 to 125", list(range(32, 128, 3)), 12, 64, is_causal=False, quick=True),
        case("16 of 64 to 514", list(range(64, 544, 30)), 6, 64),
        case("1 of 2048 and 64 of 9", [2048, *[9] * 64], 4, 128),
        case("3 of 1", [1] * 3, 12, 64),
    ),
    cuda_cases=(
        case("16 of 256 to 1756", list(range(256, 1856, 100)), 16, 128, dtypes=("bf16",), quick=True),
        case("64 of 64 to 442", list(range(64, 448, 6)), 12, 64, is_causal=False, dtypes=("bf16",)),
        case("1 of 8192 and 64 of 99", [8192, *[99] * 64], 16, 128, dtypes=("bf16",)),
    ),
    tiny=case("tiny", [3, 1, 4], 2, 8),
)

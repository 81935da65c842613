"""attention beside torch's scaled_dot_product_attention, which is "eager" here."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bigmodel_fast import ops
from bigmodel_fast.ops.attention import reference

from .cases import Case, Draw, OpBenchmark, normal, projected, values


def sdpa(query: Tensor, key: Tensor, value: Tensor, *, key_lengths: Tensor | None = None, **options: Any) -> Tensor:
    """Padding is a boolean mask, as users of padded batches pass it."""
    if key_lengths is not None:
        options["attn_mask"] = torch.arange(key.shape[2], device=key.device) < key_lengths[:, None, None, None]
    return F.scaled_dot_product_attention(query, key, value, **options)


def flops(query: Tensor, key: Tensor, value: Tensor, *, is_causal=False, key_lengths=None, **_: Any):
    """Two products over the pairs that may meet in forward, five in backward."""
    b, h, s, d = query.shape
    if key_lengths is not None:
        pairs = h * s * int(key_lengths.sum())
    else:
        pairs = b * h * (s * (s + 1) // 2 if is_causal else s * key.shape[2])
    return 4.0 * pairs * d, 10.0 * pairs * d


def qkv(b: int, h: int, s: int, d: int, kv_heads: int | None = None, keys: int | None = None, draw=normal):
    """query, key and value."""
    kv = (b, kv_heads or h, keys or s, d)
    return {"query": draw(b, h, s, d), "key": draw(*kv), "value": draw(*kv)}


def causal(b: int, h: int, s: int, d: int, quick: bool = False) -> Case:
    return Case(f"causal {b}x{h}x{s}x{d}", qkv(b, h, s, d), {"is_causal": True}, quick)


def lengths(batch: int, longest: int) -> Draw:
    """Of padded sequences: spread evenly from a quarter of the longest to the longest."""
    return values(lambda: torch.linspace(longest // 4, longest, batch).long())


BENCHMARK = OpBenchmark(
    name="attention",
    unit="FLOP",
    functions={"bigmodel_fast": ops.attention, "eager": sdpa},
    reference=reference,
    count=flops,
    cases=(
        causal(16, 6, 256, 64, quick=True),
        causal(4, 12, 512, 64),
        causal(1, 12, 2048, 64),
        causal(1, 8, 2048, 128),
        causal(32, 12, 128, 64),
        causal(1, 4, 4096, 64),
        causal(3, 5, 333, 80),
        Case("causal 4x12x512x64 from a projection", qkv(4, 12, 512, 64, draw=projected), {"is_causal": True}),
        Case(
            "causal gqa 4x12/4x512x64",
            qkv(4, 12, 512, 64, kv_heads=4),
            {"is_causal": True, "enable_gqa": True},
        ),
        Case("full 16x6x256x64", qkv(16, 6, 256, 64)),
        Case("full 1x8x2048x128", qkv(1, 8, 2048, 128)),
        Case("full 32x12x128x64 padded", {**qkv(32, 12, 128, 64), "key_lengths": lengths(32, 128)}, quick=True),
        Case("full 32x12x128x64 dropout 0.1", qkv(32, 12, 128, 64), {"dropout_p": 0.1}),
        Case("one query 8x12x1x64, 1024 keys", qkv(8, 12, 1, 64, keys=1024)),
    ),
    tiny=Case("tiny", qkv(2, 2, 5, 8), {"is_causal": True}),
)

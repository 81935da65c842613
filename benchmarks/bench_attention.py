"""attention beside torch's scaled_dot_product_attention, which is "eager" here.

On a GPU "eager" takes the backend that torch chooses, and its backends for FlashAttention and cuDNN take part by name
as well, and so does FlexAttention, compiled, for the masks that it is made for. "native" are our kernels in CUDA C++,
where this build has them; "bigmodel_fast" is Triton there.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from bigmodel_fast import ops
from bigmodel_fast.ops import _cuda
from bigmodel_fast.ops.attention import allowed_mask, reference

from .cases import Case, Draw, OpBenchmark, native, normal, projected, values

Window = tuple[int, int] | None
BF16 = ("bf16",)


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    window: Window = None,
    alibi_slopes: Tensor | None = None,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Padding is a boolean mask, as users of padded batches pass it; a window or ALiBi is one that is made once."""
    if key_lengths is not None:
        options["attn_mask"] = torch.arange(key.shape[2], device=key.device) < key_lengths[:, None, None, None]
    elif window is not None or alibi_slopes is not None:
        dtype = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else None
        options["attn_mask"] = added(
            alibi_slopes, query.shape[2], key.shape[2], window, is_causal, query.device, dtype or query.dtype
        )
        is_causal = False
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, **options)


@lru_cache(maxsize=1)
def added(
    slopes: Tensor | None,
    queries: int,
    keys: int,
    window: Window,
    is_causal: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Tensor:
    """The mask that is added to the scores: [1, 1 or H, queries, keys]."""
    mask = torch.zeros(1, 1, queries, keys, device=device)
    if slopes is not None:
        position = torch.arange(queries, device=device)[:, None] + (keys - queries)
        distance = (position - torch.arange(keys, device=device)).abs()
        mask = -slopes[:, None, None] * distance[None, None]
    allowed = allowed_mask(queries, keys, is_causal=is_causal, window=window, key_lengths=None, device=device)
    if allowed is not None:
        mask = mask.masked_fill(~allowed, -torch.inf)
    return mask.to(dtype)


def with_backend(backend: SDPBackend) -> Callable:
    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(query, key, value, **options)

    return attention


@cache
def compiled_flex() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=1)
def blocks(queries: int, keys: int, window: Window, is_causal: bool, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    left, right = window if window is not None else (keys, keys)
    right = 0 if is_causal else right

    def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        position = q + (keys - queries)
        return (k >= position - left) & (k <= position + right)

    return create_block_mask(visible, None, None, queries, keys, device=device)


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: Window = None,
    alibi_slopes: Tensor | None = None,
    is_causal: bool = False,
    enable_gqa: bool = False,
    call: Callable | None = None,
) -> Tensor:
    """call: flex_attention itself in place of its compiled form."""
    queries, keys = query.shape[2], key.shape[2]

    def biased(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert alibi_slopes is not None
        return score - alibi_slopes[h] * (q + (keys - queries) - k).abs()

    change = None if alibi_slopes is None else biased
    block_mask = blocks(queries, keys, window, is_causal, query.device)
    return (call or compiled_flex())(query, key, value, change, block_mask, enable_gqa=enable_gqa)


def by_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_lengths: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    enable_gqa: bool = False,
    **options: Any,
) -> Tensor:
    """The reference for one head after the other, again in backward, so that one head's scores are held at a time."""
    group = query.shape[1] // key.shape[1]

    def one(b: int, h: int) -> Tensor:
        part = slice(b, b + 1), slice(h, h + 1)
        shared = slice(b, b + 1), slice(h // group, h // group + 1)
        extra = dict(options)
        if key_lengths is not None:
            extra["key_lengths"] = key_lengths[part[0]]
        if alibi_slopes is not None:
            extra["alibi_slopes"] = alibi_slopes[part[1]]
        call = (query[part], key[shared], value[shared])
        return checkpoint(reference, *call, use_reentrant=False, preserve_rng_state=False, **extra)[0, 0]

    heads = [[one(b, h) for h in range(query.shape[1])] for b in range(query.shape[0])]
    return torch.stack([torch.stack(row) for row in heads])


def pairs(queries: int, keys: int, is_causal: bool, window: Window) -> int:
    """How many pairs of a query and a key may meet."""
    left, right = window if window is not None else (keys, keys + queries)
    position = torch.arange(queries) + (keys - queries)
    first = (position - left).clamp(min=0)
    last = (position + (0 if is_causal else right)).clamp(max=keys - 1)
    return int((last - first + 1).clamp(min=0).sum())


def flops(query: Tensor, key: Tensor, value: Tensor, *, is_causal=False, window=None, key_lengths=None, **_: Any):
    """Two products over the pairs that may meet in forward, five in backward."""
    b, h, s, d = query.shape
    if key_lengths is not None:
        count = h * s * int(key_lengths.sum())
    else:
        count = b * h * pairs(s, key.shape[2], is_causal, window)
    return 4.0 * count * d, 10.0 * count * d


def qkv(b: int, h: int, s: int, d: int, kv_heads: int | None = None, keys: int | None = None, draw=normal):
    """query, key and value."""
    kv = (b, kv_heads or h, keys or s, d)
    return {"query": draw(b, h, s, d), "key": draw(*kv), "value": draw(*kv)}


def causal(b: int, h: int, s: int, d: int, quick: bool = False, kv_heads: int | None = None, **how: Any) -> Case:
    options = {"is_causal": True} | ({"enable_gqa": True} if kv_heads else {})
    name = f"causal {b}x{h}x{s}x{d}" if kv_heads is None else f"causal gqa {b}x{h}/{kv_heads}x{s}x{d}"
    return Case(name, qkv(b, h, s, d, kv_heads), options, quick, **how)


def lengths(batch: int, longest: int) -> Draw:
    """Of padded sequences: spread evenly from a quarter of the longest to the longest."""
    return values(lambda: torch.linspace(longest // 4, longest, batch).long())


def slopes(heads: int) -> Draw:
    """ALiBi's, for a power of two heads: 2^(-8 i / heads)."""
    return values(lambda: 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads))


NATIVE = ("native",) if _cuda.BUILT else ()
ALL = ("bigmodel_fast", *NATIVE, "eager", "eager flash", "eager cudnn")
MASKED = ("bigmodel_fast", *NATIVE, "eager", "flex")

BENCHMARK = OpBenchmark(
    name="attention",
    unit="FLOP",
    functions={"bigmodel_fast": ops.attention, "eager": sdpa},
    cuda_functions={
        **native(ops.attention),
        "eager flash": with_backend(SDPBackend.FLASH_ATTENTION),
        "eager cudnn": with_backend(SDPBackend.CUDNN_ATTENTION),
        "flex": flex,
    },
    reference=by_head,
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
        causal(4, 12, 512, 64, kv_heads=4),
        Case("full 16x6x256x64", qkv(16, 6, 256, 64)),
        Case("full 1x8x2048x128", qkv(1, 8, 2048, 128)),
        Case("full 32x12x128x64 padded", {**qkv(32, 12, 128, 64), "key_lengths": lengths(32, 128)}, quick=True),
        Case("full 32x12x128x64 dropout 0.1", qkv(32, 12, 128, 64), {"dropout_p": 0.1}),
        Case("one query 8x12x1x64, 1024 keys", qkv(8, 12, 1, 64, keys=1024)),
    ),
    cuda_cases=(
        causal(4, 16, 4096, 128, quick=True, dtypes=BF16, providers=ALL),
        causal(8, 16, 2048, 128, dtypes=BF16, providers=ALL),
        causal(2, 16, 8192, 128, dtypes=BF16, providers=ALL),
        causal(1, 16, 16384, 128, dtypes=BF16, providers=ALL),
        causal(16, 12, 1024, 64, quick=True, dtypes=BF16, providers=ALL),
        causal(4, 32, 4096, 64, dtypes=BF16, providers=ALL),
        causal(4, 32, 4096, 128, kv_heads=8, dtypes=BF16, providers=ALL),
        Case("full 4x16x4096x128", qkv(4, 16, 4096, 128), dtypes=BF16, providers=ALL),
        Case(
            "causal 4x16x4096x128 from a projection",
            qkv(4, 16, 4096, 128, draw=projected),
            {"is_causal": True},
            dtypes=BF16,
            providers=ALL,
        ),
        Case(
            "causal 1x16x8192x128 window 1024",
            qkv(1, 16, 8192, 128),
            {"is_causal": True, "window": (1023, 0)},
            dtypes=BF16,
            providers=MASKED,
        ),
        Case(
            "causal 2x16x4096x128 alibi",
            {**qkv(2, 16, 4096, 128), "alibi_slopes": slopes(16)},
            {"is_causal": True},
            dtypes=BF16,
            providers=MASKED,
        ),
        Case(
            "causal 4x16x4096x128 dropout 0.1",
            qkv(4, 16, 4096, 128),
            {"is_causal": True, "dropout_p": 0.1},
            dtypes=BF16,
            providers=("bigmodel_fast", *NATIVE, "eager", "eager flash"),
        ),
        Case(
            "full 64x12x512x64 padded",
            {**qkv(64, 12, 512, 64), "key_lengths": lengths(64, 512)},
            dtypes=BF16,
            providers=("bigmodel_fast", "eager"),
        ),
        Case(
            "one query 64x32/8x1x128, 8192 keys",
            qkv(64, 32, 1, 128, kv_heads=8, keys=8192),
            {"enable_gqa": True},
            dtypes=BF16,
            providers=ALL,
        ),
        causal(2, 16, 2048, 64, dtypes=("fp32",), providers=("bigmodel_fast", "eager")),
    ),
    tiny=Case("tiny", qkv(2, 2, 5, 8), {"is_causal": True}),
)

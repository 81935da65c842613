"""Calls of the launchers with training's shapes, on tensors without memory, so that every launch choice comes up."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from bigmodel_fast.kernels import (
    attention,
    cross_entropy,
    dropout,
    embedding,
    gated_mlp,
    gemm,
    layer_norm,
    linear,
    linear_cross_entropy,
    mlp,
    optim,
    rms_norm,
    rotary,
)
from torch import Tensor

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Case = tuple[str, Callable[[], object]]


def meta(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def norms(dtype: torch.dtype) -> Iterator[Case]:
    for width in (100, 768, 4096, 16384, 20000):
        x, w, stats = meta(8192, width, dtype=dtype), meta(width), meta(8192)
        yield f"rms_norm-{width}", partial(rms_norm.rms_norm_fwd, x, w, x, 1e-6, dtype)
        yield f"rms_norm-backward-{width}", partial(rms_norm.rms_norm_bwd, x, x, x, w, stats, False)
        yield f"layer_norm-{width}", partial(layer_norm.layer_norm_fwd, x, w, w, None, 1e-5, dtype)
        yield f"layer_norm-backward-{width}", partial(layer_norm.layer_norm_bwd, x, None, x, w, stats, stats, False)
    wide = meta(8192, 768)
    y, w, stats = meta(8192, 768, dtype=dtype), meta(768), meta(8192)
    yield "rms_norm-narrow", partial(rms_norm.rms_norm_bwd, y, wide, wide, w, stats, True)


def by_width(dtype: torch.dtype, width: int) -> Iterator[Case]:
    """Kernels whose launch choices follow from the width of a row, with all that they can be asked for."""
    x, w, stats = meta(8192, width, dtype=dtype), meta(width), meta(8192)
    yield f"width-{width}-norm", partial(layer_norm.layer_norm_fwd, x, w, w, x, 1e-5, dtype)
    yield f"width-{width}-norm-backward", partial(layer_norm.layer_norm_bwd, x, x, x, w, stats, stats, False)
    target, options = meta(8192, dtype=torch.int64), (-100, 0.1, 30.0)
    yield f"width-{width}-loss", partial(cross_entropy.cross_entropy_fwd, x, target, *options, "mean")
    backward = partial(cross_entropy.cross_entropy_bwd, meta(), x, target, meta(8192, 2), *options, "mean")
    yield f"width-{width}-loss-backward", backward
    in_place = partial(cross_entropy.differentiate_in_place, x, target, stats, stats, meta(), *options)
    yield f"width-{width}-loss-in-place", in_place
    yield f"width-{width}-embedding", partial(embedding.embedding_fwd, target, x)
    yield f"width-{width}-embedding-backward", partial(embedding.embedding_bwd, x, target, 8192, dtype)
    if width <= 128:  # half a head
        q, table = meta(4, 32, 2048, 2 * width, dtype=dtype), meta(2048, 2 * width)
        yield f"width-{width}-rotary", partial(rotary.rotary_fwd, q, q, table, table, False)


def widths(dtype: torch.dtype) -> Iterator[Case]:
    for i in range(16):
        yield from by_width(dtype, 1 << i)


def rotations(dtype: torch.dtype) -> Iterator[Case]:
    for heads, dim in ((32, 128), (12, 64), (3, 96)):
        q, k = meta(4, 2048, heads, dim, dtype=dtype).transpose(1, 2), meta(4, heads, 2048, dim, dtype=dtype)
        for inverse in (False, True):
            yield f"rotary-{heads}x{dim}", partial(rotary.rotary_fwd, q, k, meta(2048, dim), meta(2048, dim), inverse)


def dense(dtype: torch.dtype) -> Iterator[Case]:
    x, pre, w, b = meta(8192, 768, dtype=dtype), meta(8192, 3072, dtype=dtype), meta(3072, 768, dtype=dtype), meta(3072)
    down = meta(768, 3072, dtype=dtype)
    for kind in ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "relu2"):
        yield f"linear-{kind}", partial(linear.linear_fwd, x, w, b, kind, True)
        yield f"mlp-backward-{kind}", partial(mlp.mlp_bwd, x, x, w, down, pre, kind, [True] * 5)
        yield f"linear-backward-{kind}", partial(linear.linear_bwd, pre, x, w, pre, kind, [True] * 3)
        yield f"gated_mlp-{kind}", partial(gated_mlp.gated_mlp_fwd, x, w, w, down, kind, True)
        yield (
            f"gated_mlp-backward-{kind}",
            partial(gated_mlp.gated_mlp_bwd, x, x, w, w, down, pre, pre, kind, [True] * 4),
        )


def dropouts(dtype: torch.dtype) -> Iterator[Case]:
    x, seed = meta(8192, 768, dtype=dtype), meta(1, dtype=torch.int64)
    yield "dropout", partial(dropout.dropout_fwd, x, seed, 0.1, None, dtype)
    yield "dropout-residual", partial(dropout.dropout_fwd, x, seed, 0.1, meta(8192, 768), F32)
    yield "residual", partial(dropout.dropout_fwd, x, None, 0.0, x, dtype)


def products(dtype: torch.dtype) -> Iterator[Case]:
    """The dense layer in one kernel, with every tile that a GPU has."""
    if dtype is not F32:  # which it does not take
        x, w, b = meta(8192, 768, dtype=dtype), meta(3072, 768, dtype=dtype), meta(3072)
        for kind in ("none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "relu2"):
            yield f"gemm-{kind}", partial(_layers, x, w, b, kind)


def _layers(x: Tensor, weight: Tensor, bias: Tensor, kind: str) -> None:
    for blocks in gemm.candidates(x, weight):
        gemm.layer(x, weight, bias, kind, kind != "none", blocks)


def losses(dtype: torch.dtype) -> Iterator[Case]:
    target, none = meta(4096, dtype=torch.int64), [False] * 3
    for classes, smoothing, softcap in ((50304, 0.0, 0.0), (128256, 0.1, 30.0), (10, 0.1, 0.0), (1000, 0.0, 30.0)):
        logits, options = meta(4096, classes, dtype=dtype), (-100, smoothing, softcap, "mean")
        yield f"cross_entropy-{classes}", partial(cross_entropy.cross_entropy_fwd, logits, target, *options)
        backward = partial(cross_entropy.cross_entropy_bwd, meta(), logits, target, meta(4096, 2), *options)
        yield f"cross_entropy-backward-{classes}", backward
        x, w, b = meta(4096, 768, dtype=dtype), meta(classes, 768, dtype=dtype), meta(classes)
        fused = partial(linear_cross_entropy.linear_cross_entropy_fwd, x, w, b, target, *options)
        yield f"linear_cross_entropy-{classes}", partial(fused, [True] * 3)
        yield f"linear_cross_entropy-forward-{classes}", partial(fused, none)
    each = partial(linear_cross_entropy.linear_cross_entropy_bwd, meta(4096), x, w, None, target)
    yield "linear_cross_entropy-none", partial(each, -100, 0.0, 0.0, "none", [True, True, False])
    yield "scale", partial(linear_cross_entropy.scale_gradients, [x, w], meta())


def embeddings(dtype: torch.dtype) -> Iterator[Case]:
    token = meta(8192, dtype=torch.int64)
    for classes, width in ((50304, 768), (128256, 4096), (65, 10)):
        yield f"embedding-{width}", partial(embedding.embedding_fwd, token, meta(classes, width, dtype=dtype))
        grad = meta(8192, width, dtype=dtype)
        yield f"embedding-backward-{width}", partial(embedding.embedding_bwd, grad, token, classes, dtype)


@dataclass(frozen=True)
class Attention:
    """A call of attention; tensors are named by what they add to the plain call."""

    name: str
    dim: int = 128
    queries: int = 4096
    keys: int = 4096
    batch: int = 4
    heads: int = 32
    key_heads: int = 8
    causal: bool = False
    window: int | None = None
    softcap: float = 0.0
    alibi: bool = False
    bias: tuple[int, int, int, int] | None = None
    mask: bool = False
    lengths: bool = False
    packed: bool = False
    dropout: float = 0.0

    def calls(self, dtype: torch.dtype) -> Iterator[Case]:
        batch, heads, everything = self.batch, self.heads, 1 << 40
        q = meta(batch, self.queries, heads, self.dim, dtype=dtype).transpose(1, 2)
        k = v = meta(batch, self.keys, self.key_heads, self.dim, dtype=dtype).transpose(1, 2)
        boundaries = None
        if self.packed:
            q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
            boundaries = meta(9, dtype=torch.int32)
        bias = None if self.bias is None else meta(*self.bias, dtype=dtype)
        if self.mask:
            bias = meta(batch, 1, 1, self.keys, dtype=torch.bool)
        expanded = None if bias is None else bias.expand(batch, heads, self.queries, self.keys)
        options = (
            expanded,
            meta(heads) if self.alibi else None,
            meta(batch, dtype=torch.int64) if self.lengths else None,
            boundaries,
            boundaries,
            meta(1, dtype=torch.int64) if self.dropout else None,
            self.dim**-0.5,
            self.softcap,
            everything if self.window is None else self.window,
            0 if self.causal else everything if self.window is None else self.window,
            self.dropout,
        )
        stats = meta(heads, q.shape[0], 2) if self.packed else meta(batch, heads, self.queries, 2)
        yield f"attention-{self.name}", partial(attention.attention_fwd, q, k, v, *options)
        shape = list(self.bias) if self.bias is not None else []
        joined = not self.packed and self.queries == self.keys
        backward = partial(attention.attention_bwd, q, q, k, v, q, stats, *options, shape, joined)
        yield f"attention-backward-{self.name}", backward


EVERY_DIM = tuple(Attention(f"dim-{dim}", dim=dim, causal=True) for dim in (16, 32, 64, 80, 96, 112, 128, 192, 256))
FEATURES = (
    Attention("full"),
    Attention("window", window=512),
    Attention("causal-window", window=512, causal=True),
    Attention("softcap", softcap=30.0, causal=True),
    Attention("alibi", alibi=True, causal=True),
    Attention("bias", bias=(1, 32, 4096, 4096)),
    Attention("row-bias", bias=(4, 1, 1, 4096), softcap=30.0),
    Attention("mask", mask=True),
    Attention("lengths", lengths=True, causal=True),
    Attention("packed", packed=True, causal=True),
    Attention("dropout", dropout=0.1, causal=True),
    Attention("dropout-64", dropout=0.1, dim=64),
    Attention("everything", window=512, softcap=30.0, alibi=True, mask=True, lengths=True, dropout=0.1, causal=True),
    Attention("everything-256", dim=256, bias=(1, 32, 4096, 4096), softcap=30.0, alibi=True, dropout=0.1, causal=True),
    Attention("one-query", queries=1),
    Attention("decode", queries=1, key_heads=32, window=1000, causal=True),
    Attention("decode-256", queries=4, dim=256, key_heads=16, lengths=True, causal=True),
    Attention("decode-64", queries=8, dim=64, key_heads=4, softcap=30.0, causal=True),
    Attention("decode-long", queries=1, keys=16384, dim=64, key_heads=2, causal=True),
    Attention("decode-80", queries=3, dim=80, bias=(4, 32, 3, 4096), alibi=True, lengths=True, causal=True),
    Attention("decode-everything-32", queries=8, window=512, softcap=30.0, alibi=True, mask=True, lengths=True),
    Attention("decode-everything", queries=16, window=512, softcap=30.0, alibi=True, mask=True, lengths=True),
    Attention("decode-everything-256", queries=8, dim=256, softcap=30.0, alibi=True, mask=True, lengths=True),
    Attention("one-query-dropout", queries=1, keys=1, dropout=0.1, key_heads=32),
    Attention("few-queries", queries=50, causal=True, packed=True),
)


# The most that can be asked for with as many extras (attention_tiles.py) as rows of the tables take: all or none of
# them, with a dimension of heads that is no power of two, which needs more registers.
MOST: dict[str, dict] = {
    "all": {"lengths": True, "bias": (4, 32, 4096, 4096), "softcap": 30.0, "alibi": True, "dropout": 0.1},
    "packed-all": {"packed": True, "softcap": 30.0, "alibi": True, "dropout": 0.1},
    "none": {"lengths": True},
    "packed": {"packed": True},
}
DEMANDING = tuple(
    Attention(f"demanding-{dim}-{name}", dim=dim, window=512, causal=True, **extras)
    for dim in (192, 80)
    for name, extras in MOST.items()
)
# What adds a choice here and there: rows of the tables in between, and fewer queries than a tile has.
THREE: dict = {"lengths": True, "mask": True, "softcap": 30.0, "alibi": True}  # the most that decode takes
BETWEEN: dict[str, dict] = {
    "three": THREE,
    "mask": {"lengths": True, "mask": True},
    "dropout": {"lengths": True, "dropout": 0.1},
}
FILLING = tuple(
    replace(call, name=f"filling-{call.name}-{queries}", queries=queries, bias=call.bias and (4, 32, queries, 4096))
    for queries in (4096, 64, 32, 16)
    for dim in (192, 80, 64)
    for call in (
        Attention(f"{dim}-{name}", dim=dim, key_heads=2, window=512, causal=True, **extras)
        for name, extras in (MOST | BETWEEN).items()
        if "packed" not in extras
    )
)
DECODES = tuple(
    Attention(f"filling-decode-{dim}-{rows}", dim=dim, queries=1, heads=2 * rows, key_heads=2, window=512, **THREE)
    for dim in (192, 80, 64)
    for rows in (64, 32, 16)
)
SPLITS = tuple(
    Attention(f"filling-splits-{heads}", dim=256, queries=1, keys=32768, batch=1, heads=max(32, heads), key_heads=heads)
    for heads in (1 << i for i in range(9))
)


def attentions(dtype: torch.dtype) -> Iterator[Case]:
    for call in (*EVERY_DIM, *FEATURES, *DEMANDING, *FILLING, *DECODES, *SPLITS):
        # Wider heads in float32 take the reference; a single key in it spills a little, and is no case to tune for.
        if dtype is not F32 or (call.dim <= 128 and call.keys > 1):
            yield from call.calls(dtype)


def optimizer(dtype: torch.dtype) -> Iterator[Case]:
    sizes = (50304 * 768, 768, 3, 0)
    params, grads = ([meta(n, dtype=t) for n in sizes] for t in (F32, dtype))
    yield (
        "adamw",
        partial(optim.adamw_, params, grads, params, params, [1] * 4, 1e-3, 0.9, 0.95, 1e-8, 0.1, False, 1.0, True),
    )
    descend = partial(optim.sgd_, params, grads)
    yield "sgd", partial(descend, [], [], 1e-2, 0.0, 0.0, 0.1, False, False)
    for nesterov in (False, True):
        yield f"sgd-{nesterov}", partial(descend, params, [1, 2, 2, 2], 1e-2, 0.9, 0.0, 0.1, nesterov, False)
    yield "clip", partial(optim.clip_grad_norm, grads, 1.0)


GROUPS: dict[str, Callable[[torch.dtype], Iterator[Case]]] = {
    "norms": norms,
    "widths": widths,
    "rotary": rotations,
    "dense": dense,
    "products": products,
    "losses": losses,
    "dropout": dropouts,
    "embedding": embeddings,
    "optimizer": optimizer,
    "attention": attentions,
}

"""attention and attention_varlen on NVIDIA GPUs: launch choices, allocation and the hand-over to the kernels.

The equations are in `attention_forward.py` and `attention_backward.py`; few queries of many keys take
`attention_decode.py`. Head dimensions are padded to the next power of two in registers; memory is read as it is.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from . import autotune, launch
from .attention_backward import bias_gradient, key_gradients, query_gradient
from .attention_decode import combine, decode
from .attention_forward import forward
from .attention_tiles import DECODE_KEYS, MOST_SPLITS, alternatives, choose, columns_of, split_keys

FEATURES = ("BIAS", "ALIBI", "LENGTHS", "PACKED", "SOFTCAP", "DROPOUT", "LEFT", "RIGHT")
MOST_ROWS = 256  # no tile has more
FURTHEST = 1 << 30  # positions are 32-bit: a window that reaches further is as good as none


def _contiguous_rows(t: Tensor) -> Tensor:
    """Elements of a row side by side, and a tile's rows within reach of a 32-bit offset; a copy where they are not."""
    row = t.stride(0 if t.dim() == 3 else 2)
    return t if (t.shape[-1] == 1 or t.stride(-1) == 1) and row * MOST_ROWS < 2**31 else t.contiguous()


def _tokens_first(t: Tensor) -> Tensor:
    """[B, H, S, D] or [tokens, H, D], in memory [B, S, H, D]; without a copy if it lies so already."""
    return t.contiguous() if t.dim() == 3 else t.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_heads(t: Tensor) -> Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format) if t.dim() == 3 else _empty_tokens_first(t)


def _empty_tokens_first(t: Tensor) -> Tensor:
    b, h, s, d = t.shape
    return t.new_empty((b, s, h, d)).transpose(1, 2)


def _strides(t: Tensor) -> tuple[int, int, int]:
    """From batch to batch, head to head and row to row."""
    return (0, t.stride(1), t.stride(0)) if t.dim() == 3 else (t.stride(0), t.stride(1), t.stride(2))


@dataclass
class Call:
    """The arguments of torch.ops.bigmodel_fast.attention_fwd, and what all kernels take of them."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor | None
    alibi_slopes: Tensor | None
    key_lengths: Tensor | None
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    seed: Tensor | None
    scale: float
    softcap: float
    left: int
    right: int
    dropout: float

    def __post_init__(self) -> None:
        self.query, self.key, self.value = (_contiguous_rows(t) for t in (self.query, self.key, self.value))
        device = self.query.device
        self.cu_seqlens_q, self.cu_seqlens_k, self.key_lengths, self.seed = (
            None if t is None else t.to(device, non_blocking=True).contiguous()
            for t in (self.cu_seqlens_q, self.cu_seqlens_k, self.key_lengths, self.seed)
        )
        self.packed = self.query.dim() == 3
        self.heads, self.key_heads, self.dim = self.query.shape[1], self.key.shape[1], self.query.shape[-1]
        self.group = self.heads // max(1, self.key_heads)
        self.queries, self.keys = (t.shape[0 if self.packed else 2] for t in (self.query, self.key))
        self.batches = 1 if self.packed else self.query.shape[0]
        self.sequences = self.cu_seqlens_q.numel() - 1 if self.cu_seqlens_q is not None else self.batches
        features = (self.softcap != 0, self.bias is not None, self.alibi_slopes is not None)
        self.modified = any(features) or not self.scale > 0
        self.extras = sum(features) + (self.dropout > 0)

    def tensors(self) -> tuple[Tensor, ...]:
        """An absent tensor is stood in for by one that is never read."""
        optional = (
            self.bias, self.alibi_slopes, self.key_lengths, self.cu_seqlens_q, self.cu_seqlens_k, self.seed,
        )  # fmt: skip
        return self.query, self.key, self.value, *(self.query if t is None else t for t in optional)

    def numbers(self) -> tuple[int | float, ...]:
        kept = 1.0 - self.dropout
        return (
            self.heads, self.group, self.queries, self.keys, self.dim, self.sequences,
            *_strides(self.query), *_strides(self.key), *_strides(self.value),
            *(self.bias.stride() if self.bias is not None else (0, 0, 0, 0)),
            self.heads if self.alibi_slopes is not None and self.alibi_slopes.dim() == 2 else 0,
            0 if self.packed else self.heads * self.queries,
            self.scale, self.softcap, min(self.left, FURTHEST), min(self.right, FURTHEST),
            int(ctypes.c_float(self.dropout).value * 65536 + 0.5), 1.0 / kept,
        )  # fmt: skip

    def constants(self, tiles: launch.Tiles) -> dict[str, object]:
        kind = "none"
        if self.bias is not None:
            kind = "boolean" if self.bias.dtype is torch.bool else "added"
        columns = columns_of(self.dim)
        return {
            "BIAS": kind,
            "ALIBI": self.alibi_slopes is not None,
            "LENGTHS": self.key_lengths is not None,
            "PACKED": self.packed,
            "SOFTCAP": self.softcap != 0,
            "DROPOUT": self.dropout > 0,
            "LEFT": self.left < self.keys - 1,
            "RIGHT": self.right < (self.keys if self.packed else self.queries - 1),
            "MODIFIED": self.modified,
            "PRECISION": tiles.precision,
            "EVEN": columns == self.dim,
            "DIM": columns,
            "QUERIES": tiles.queries,
            "KEYS": tiles.keys,
        }

    def tiles(self, kernel) -> launch.Tiles:
        # Where sequences begin takes registers of key_gradients, which has none to spare.
        extras = self.extras + (self.packed and kernel is key_gradients)
        target = launch.target_of(self.query)
        rows = self.queries * self.group if kernel is decode else self.queries
        return choose(kernel.__name__, target, self.query.dtype, self.dim, extras, rows)

    def shape_class(self) -> tuple[object, ...]:
        """What a choice of tiles may depend on."""
        sizes = (self.batches * self.heads, self.queries, self.keys)
        features = {k: v for k, v in self.constants(launch.Tiles(0, 0, 0, 0)).items() if k in FEATURES}
        window = launch.power_of_two(self.left + 1) if features["LEFT"] else 0
        return (
            *map(launch.power_of_two, sizes), self.group, self.dim, window,
            *(f"{k}={v}" for k, v in features.items() if v not in (False, "none")),
        )  # fmt: skip

    def start(self, kernel, by: Callable[[launch.Tiles], None]) -> None:
        """Runs `by` with tiles for a kernel."""
        tiles = self.tiles(kernel)
        if autotune.ENABLED:
            name = kernel.__name__
            candidates = (tiles, *alternatives(name, tiles, self.dim))
            tiles = autotune.pick(name, self.shape_class(), candidates, by, self.query)
        by(tiles)

    def grid(self, rows: int, block: int) -> int:
        """How many tiles the rows of all sequences take, without a look at the lengths of packed ones."""
        return rows // block + self.sequences if self.packed else self.batches * triton.cdiv(rows, block)

    def run(self, kernel, grid: tuple[int, ...], tensors: tuple[Tensor, ...], tiles: launch.Tiles, **more) -> None:
        """`more`: further numbers (lower case) and constants (upper case) of this kernel."""
        numbers = tuple(v for k, v in more.items() if k.islower())
        constants = {k: v for k, v in more.items() if k.isupper()}
        launch.run(
            kernel,
            grid,
            (*self.tensors(), *tensors, *self.numbers(), *numbers),
            {**self.constants(tiles), **constants},
            tiles.warps,
            tiles.stages,
        )


def attention_fwd(query: Tensor, key: Tensor, value: Tensor, *rest) -> tuple[Tensor, Tensor]:
    call = Call(query, key, value, *rest)
    out = _empty_heads(query)
    shape = (call.heads, call.queries, 2) if call.packed else (*query.shape[:3], 2)
    stats = query.new_empty(shape, dtype=torch.float32)
    few = call.queries * call.group <= call.tiles(decode).queries and call.keys >= DECODE_KEYS
    if few and not call.packed and not call.dropout:
        call.start(decode, lambda tiles: _decode(call, out, stats, tiles))
    else:
        call.start(forward, lambda tiles: call.run(
            forward, (call.grid(call.queries, tiles.queries), call.heads), (out, stats), tiles,
        ))  # fmt: skip
    return out, stats


def _decode(call: Call, out: Tensor, stats: Tensor, tiles: launch.Tiles) -> None:
    processors = launch.target_of(call.query).processors
    first = max(0, call.keys - call.queries - call.left)  # that any query sees
    splits = split_keys(first, call.keys, tiles.keys, call.batches * call.key_heads, processors)
    several = splits.count > 1
    parts = stats.new_empty((*stats.shape[:3], splits.count if several else 0, call.dim))
    part_stats = stats.new_empty((*parts.shape[:4], 2))
    call.run(
        decode, (call.batches * splits.count, call.key_heads), (out, stats, parts, part_stats), tiles,
        first_key=splits.first, span=splits.span, splits=splits.count, SPLIT=several,
    )  # fmt: skip
    if several:
        together = min(MOST_SPLITS, launch.power_of_two(splits.count))
        constants = {"SPLITS": together, "TOGETHER": min(16, together), "DIM": columns_of(call.dim)}
        arguments = (parts, part_stats, out, stats, call.heads, call.queries, call.dim, splits.count)
        launch.run(combine, (stats.numel() // 2,), arguments, constants, 4)


def attention_bwd(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor, *rest
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The last argument asks for the gradients of query, key and value as one tensor, [B, S, H + 2 H_kv, D]."""
    *options, bias_shape, joined = rest
    call = Call(query, key, value, *options)
    grad_out, out = _tokens_first(grad_out), _tokens_first(out)
    if joined:
        all_heads = call.heads + 2 * call.key_heads
        gradients = query.new_empty((call.batches, call.queries, all_heads, call.dim))
        parts = gradients.split([call.heads, call.key_heads, call.key_heads], dim=2)
        made = (gradients, query.new_empty(0), query.new_empty(0))
        query_row = key_row = all_heads * call.dim
    else:
        made = parts = tuple(_empty_heads(t) for t in (query, key, value))
        query_row, key_row = call.heads * call.dim, call.key_heads * call.dim
    delta = stats.new_empty(stats.shape[:-1])
    call.start(query_gradient, lambda tiles: call.run(
        query_gradient, (call.grid(call.queries, tiles.queries), call.heads), (out, grad_out, stats, delta, parts[0]),
        tiles, grad_row=query_row,
    ))  # fmt: skip
    call.start(key_gradients, lambda tiles: call.run(
        key_gradients, (call.grid(call.keys, tiles.keys), call.key_heads), (grad_out, stats, delta, parts[1], parts[2]),
        tiles, grad_row=key_row,
    ))  # fmt: skip
    if not bias_shape:
        return *made, query.new_empty(0, dtype=torch.float32)
    return *made, _bias_gradient(call, grad_out, stats, delta, bias_shape)


def _bias_gradient(call: Call, grad_out: Tensor, stats: Tensor, delta: Tensor, shape: list[int]) -> Tensor:
    grad_bias = stats.new_zeros(shape) if 0 in call.query.shape else stats.new_empty(shape)
    tiles = call.tiles(bias_gradient)
    full = (call.batches, call.heads, call.queries, call.keys)
    same = [size == 1 and n > 1 for size, n in zip(shape, full, strict=True)]
    grid = (triton.cdiv(shape[3], tiles.keys), triton.cdiv(shape[2], tiles.queries), shape[0] * shape[1])
    names = ("SAME_BATCH", "SAME_HEAD", "SAME_QUERY", "SAME_KEY")
    call.run(
        bias_gradient, grid, (grad_out, stats, delta, grad_bias), tiles,
        batches=call.batches, **dict(zip(names, same, strict=True)),
    )  # fmt: skip
    return grad_bias


OPERATORS = {"attention_fwd": attention_fwd, "attention_bwd": attention_bwd}

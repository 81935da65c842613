"""A recipe for torchvision's Swin Transformer (Liu et al. 2021): attention within windows that shift.

Version 2 (Liu et al. 2022) is left alone: its scores are cosines that torch keeps in float32 under autocast, and by
ours in bfloat16 the gradients of logit_scale and of the position bias came out up to ten times as far from float64.

Shapes: B images of H x W positions, C wide, padded to whole windows; N positions in a window.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops._heads import split_heads
from . import probe, swap
from .projections import linears
from .swap import Fast

_CLASSES = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")
_COSINES = "cosine attention, of which torch has the more exact gradients in bfloat16"
_HIDDEN = -100.0  # what torchvision adds to the score of a position across an edge


class FastShiftedWindowAttention(Fast):
    """Attention with the position bias, and its gradient, in one operator; dropout at the end of the last product."""

    area = "attention"

    @classmethod
    def match(cls, module: nn.Module) -> dict[str, Any] | str | None:
        original = swap.original_class(module)
        if original.__name__ not in _CLASSES or original.__module__ != "torchvision.models.swin_transformer":
            return None
        if original.__name__ == _CLASSES[1]:
            return _COSINES
        return linears(module, ("qkv", "proj")) or ({} if _computes_this(module) else "a forward of its own")

    def forward(self: Any, x: Tensor) -> Tensor:
        if not swap.note(self, linears(self, ("qkv", "proj"))):
            return super().forward(x)  # type: ignore[misc]
        heads, (high, wide) = self.num_heads, self.window_size
        _, height, width, channels = x.shape
        if width % wide or height % high:
            x = F.pad(x, (0, 0, 0, -width % wide, 0, -height % high))
        padded = x.shape
        rows, columns = padded[1] // high, padded[2] // wide
        shift = [
            0 if window >= size else by
            for by, window, size in zip(self.shift_size, self.window_size, padded[1:3], strict=True)
        ]
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        windows = x.view(-1, rows, high, columns, wide, channels).transpose(2, 3).reshape(-1, high * wide, channels)
        qkv = ops.linear(windows, self.qkv.weight, self.qkv.bias).unflatten(-1, (3 * heads, -1))
        q, k, v = split_heads(qkv, [heads] * 3)
        bias = self.get_relative_position_bias()
        if any(shift):
            hidden = _across_edges(padded[1:3], self.window_size, shift, x.device) * _HIDDEN
            bias = (bias + hidden[:, None].to(bias.dtype)).repeat(len(x), 1, 1, 1)
        dropout = self.attention_dropout if self.training else 0.0
        y = ops.attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        p = self.dropout if self.training else 0.0
        y = ops.linear(y.transpose(1, 2).flatten(2), self.proj.weight, self.proj.bias, dropout_p=p)
        y = y.view(-1, rows, columns, high, wide, channels).transpose(2, 3).reshape(padded)
        if any(shift):
            y = torch.roll(y, shift, (1, 2))
        return y[:, :height, :width].contiguous()


def _across_edges(size: Any, window: Any, shift: Any, device: torch.device) -> Tensor:
    """[windows, N, N]: which positions of a window were no neighbours before the shift."""
    parts = []
    for length, part, by in zip(size, window, shift, strict=True):
        position = torch.arange(length, device=device)
        parts.append((position >= length - part).long() + (position >= length - by).long())
    region = parts[0][:, None] * 3 + parts[1]
    region = region.view(size[0] // window[0], window[0], size[1] // window[1], window[1]).transpose(1, 2)
    region = region.reshape(-1, window[0] * window[1])
    return region[:, None] != region[:, :, None]


def _computes_this(module: Any) -> bool:
    """Whether the module's own forward agrees with ours, on a small copy: padded, and shifted where it shifts."""
    heads, (high, wide) = module.num_heads, module.window_size
    channels = 2 * heads
    children: dict[str, nn.Module] = {"qkv": probe.linear(channels, 3 * channels)}
    children["proj"] = probe.linear(channels, channels)
    parameters = {name: probe.draw(*p.shape) for name, p in module._parameters.items() if p is not None}
    small, fast = (probe.small_copy(module, parameters, children) for _ in range(2))
    swap.apply(fast, FastShiftedWindowAttention, {})
    x = probe.draw(2, 2 * high + 1, wide + 1, channels)
    return probe.same(probe.run(fast, x), probe.run(small, x))

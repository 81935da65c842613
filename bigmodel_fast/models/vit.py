"""ViT: the Vision Transformer (Dosovitskiy et al. 2021), an image classifier over patches.

Its state-dict keys are those of torchvision's VisionTransformer (vit_b_16 and the like), so weights go both ways. As in
models/gpt.py, each half of a block adds to the residual stream, and the addition is part of the norm after it.
"""

from collections import OrderedDict
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from .. import nn, ops
from ..nn import parts
from ..nn.parts import untouched
from .layers import SelfAttention
from .pre_norm import at_once


@dataclass
class ViTConfig:
    """Shape of a ViT.

    Args:
        classes: outputs.
        image: height and width of an image in pixels.
        patch: height and width of a patch; they divide the image.
        channels: of an image.
        layers: blocks.
        heads: attention heads; they divide the width.
        width: of the residual stream.
        mlp_width: hidden width of the MLP. None: 4 width.
        dropout: share that training drops of what the blocks add, and of the embeddings.
    """

    classes: int = 10
    image: int = 32
    patch: int = 4
    channels: int = 3
    layers: int = 6
    heads: int = 3
    width: int = 192
    mlp_width: int | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("classes", "image", "patch", "channels", "layers", "heads", "width", "mlp_width"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"ViTConfig: {name} must be a positive integer, got {value!r}")
        if self.image % self.patch:
            raise ValueError(f"ViTConfig: image must be a multiple of patch, got {self.image} and {self.patch}")
        if self.width % self.heads:
            raise ValueError(f"ViTConfig: width must be a multiple of heads, got {self.width} and {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"ViTConfig: dropout must lie in [0, 1), got {self.dropout}")

    @property
    def tokens(self) -> int:
        """Patches of an image, and the class token."""
        return (self.image // self.patch) ** 2 + 1


class MLP(torch.nn.Sequential):
    """gelu between two Linears, 0 and 3, run as one operator."""

    activation = "gelu"

    def __init__(self, config: ViTConfig):
        hidden = config.mlp_width or 4 * config.width
        up, down = torch.nn.Linear(config.width, hidden), torch.nn.Linear(hidden, config.width)
        super().__init__(up, torch.nn.GELU(), torch.nn.Identity(), down)
        for linear in (up, down):
            torch.nn.init.xavier_uniform_(linear.weight)
            torch.nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if not self.fits_one_operator:
            return super().forward(x)
        up, down = self.dense
        return parts.mlp(x, up, down, activation=self.activation)

    @property
    def fits_one_operator(self) -> bool:
        """Whether there is a gelu between the Linears, and nothing else that does or sees something."""
        gelu, between = self[1], self[2]
        usual = untouched(gelu, torch.nn.GELU) and untouched(between, torch.nn.Identity)
        return usual and len(self) == 4 and gelu.approximate == "none"

    @property
    def dense(self) -> tuple[torch.nn.Linear, torch.nn.Linear]:
        """Up and down."""
        return cast(torch.nn.Linear, self[0]), cast(torch.nn.Linear, self[3])


class Block(torch.nn.Module):
    """One layer: attention and MLP, each after a norm of the residual stream."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(config.width, eps=1e-6) for _ in range(2))
        self.self_attention = SelfAttention(config.width, config.heads)
        self.mlp = MLP(config)
        self.dropout = torch.nn.Dropout(config.dropout)

    def to_next_norm(self, normed: Tensor, stream: Tensor, norm_after: torch.nn.Module) -> tuple[Tensor, Tensor]:
        """What follows ln_1, and the norm after this block: its output, and the stream that it normed."""
        if (found := self._at_once(normed, stream, norm_after)) is not None:
            return found
        normed, stream = self.ln_2(self.dropout(self.self_attention(normed)), stream)
        return norm_after(self.dropout(self.mlp(normed)), stream)

    def _at_once(self, normed: Tensor, stream: Tensor, norm_after: torch.nn.Module) -> tuple[Tensor, Tensor] | None:
        """As one function to autograd; None where that is not possible, or a part is not `untouched`."""
        attention, mlp, dropout = self.self_attention, self.mlp, self.dropout
        if not normed.is_cpu or torch.compiler.is_compiling():
            return None
        usual = ((attention, SelfAttention), (mlp, MLP), (dropout, torch.nn.Dropout))
        if (
            not all(untouched(*part) for part in usual)
            or not mlp.fits_one_operator
            or (dropout.training and dropout.p > 0)
        ):
            return None
        if attention.training and (attention.dropout or attention.attention_dropout):
            return None
        up, down = mlp.dense
        return at_once(
            normed,
            stream,
            (self.ln_2, norm_after),
            qkv=(attention.in_proj_weight, attention.in_proj_bias),
            out=attention.out_proj,
            up=up,
            down=down,
            activation=mlp.activation,
            heads=attention.heads,
            head_dim=attention.head_dim,
            is_causal=False,
        )


class Encoder(torch.nn.Module):
    """The blocks, the positions before them and the norm after them."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.pos_embedding = torch.nn.Parameter(torch.empty(1, config.tokens, config.width).normal_(std=0.02))
        self.dropout = torch.nn.Dropout(config.dropout)
        self.layers = torch.nn.Sequential()
        for i in range(config.layers):
            self.layers.add_module(f"encoder_layer_{i}", Block(config))
        self.ln = nn.LayerNorm(config.width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """[B, tokens, width]; the last norm's output."""
        blocks = cast(list[Block], list(self.layers))
        x = self.dropout(x + self.pos_embedding)
        normed, stream = blocks[0].ln_1(x), x
        for block, norm_after in zip(blocks, [*(b.ln_1 for b in blocks[1:]), self.ln], strict=True):
            normed, stream = block.to_next_norm(normed, stream, norm_after)
        return normed


class ViT(torch.nn.Module):
    """A ViT. Its weights are drawn from torch's global generator."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.conv_proj = torch.nn.Conv2d(config.channels, config.width, config.patch, config.patch)
        self.class_token = torch.nn.Parameter(torch.zeros(1, 1, config.width))
        self.encoder = Encoder(config)
        self.heads = torch.nn.Sequential(OrderedDict(head=nn.Linear(config.width, config.classes)))
        fan_in = config.channels * config.patch**2
        torch.nn.init.trunc_normal_(self.conv_proj.weight, std=fan_in**-0.5)
        assert self.conv_proj.bias is not None
        torch.nn.init.zeros_(self.conv_proj.bias)
        for p in self.heads.parameters():
            torch.nn.init.zeros_(p)

    def forward(self, images: Tensor) -> Tensor:
        """[B, channels, image, image] to logits [B, classes]."""
        expected = (self.config.channels, self.config.image, self.config.image)
        if images.dim() != 4 or images.shape[1:] != expected:
            raise ValueError(f"ViT: images must be [B, {', '.join(map(str, expected))}], got {list(images.shape)}")
        b, p = len(images), self.config.patch
        if untouched(self.conv_proj, torch.nn.Conv2d):
            # A convolution whose windows do not overlap is a product: patches [B, tokens - 1, channels p p].
            patches = images.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5)
            x = patches.reshape(b, self.config.tokens - 1, -1)
            x = ops.linear(x, self.conv_proj.weight.flatten(1), self.conv_proj.bias)
        else:
            x = self.conv_proj(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.to(x.dtype).expand(b, -1, -1), x], 1)
        return self.heads(self.encoder(x)[:, 0])

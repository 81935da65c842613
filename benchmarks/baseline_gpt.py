"""PlainGPT: models.GPT in ordinary PyTorch, as a careful user would write it; the baseline of the training benchmarks.

It takes GPT's state_dict, so that both train from the same weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel_fast.models.gpt import GPTConfig, _rotation


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        bias = config.layout == "gpt2"
        self.qkv = nn.Linear(config.width, (config.heads + 2 * config.key_heads) * config.head_dim, bias)
        self.out = nn.Linear(config.width, config.width, bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        c = self.config
        b, s, _ = x.shape
        heads = self.qkv(x).view(b, s, -1, c.head_dim).transpose(1, 2)
        q, k, v = heads.split([c.heads, c.key_heads, c.key_heads], dim=1)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c.heads != c.key_heads)
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden)
        self.down = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class GatedMLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1, self.norm2 = norm(config), norm(config)
        self.attention = Attention(config)
        self.mlp = MLP(config) if config.layout == "gpt2" else GatedMLP(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.attention(self.norm1(x), rotation)
        return x + self.mlp(self.norm2(x))


def norm(config: GPTConfig) -> nn.Module:
    return nn.LayerNorm(config.width) if config.layout == "gpt2" else nn.RMSNorm(config.width, eps=1e-6)


class PlainGPT(nn.Module):
    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.context, config.width) if config.layout == "gpt2" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = norm(config)
        cos, sin = _rotation(config) if config.layout == "modern" else (None, None)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        s = tokens.shape[1]
        x = self.embedding(tokens)
        rotation = None
        if self.positions is not None:
            x = x + self.positions.weight[:s]
        else:
            rotation = self.cos[:s], self.sin[:s]
        for block in self.blocks:
            x = block(x, rotation)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())

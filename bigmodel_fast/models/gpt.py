"""GPT: a decoder-only Transformer in two layouts.

"gpt2"    LayerNorm, GELU (tanh form), learned positions, biases (Radford et al. 2019); reads and writes Hugging Face's
          GPT-2 state dicts
"modern"  RMSNorm, SwiGLU, rotary positions, grouped-query attention, no biases (Touvron et al. 2023)

Each half of a block adds to the residual stream that runs between them; the addition is part of the norm after it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from .. import nn, ops
from .._packed_weights import packed_weights
from ..nn import parts
from ..nn.parts import untouched
from ..ops._heads import split_heads
from .layers import Stack
from .pre_norm import at_once
from .sampling import check_options, sample


@dataclass
class GPTConfig:
    """Shape of a GPT.

    Args:
        vocab_size: number of tokens there are.
        context: most tokens a sequence may have.
        layers: blocks.
        heads: attention heads; they divide width.
        width: of the residual stream.
        kv_heads: heads of keys and values (modern layout); they divide heads. None: as many as heads.
        mlp_width: hidden width of the MLP. None: 4 width (gpt2), or 8/3 width rounded up to a multiple of 64 (modern).
        layout: "gpt2" or "modern".
        rope_theta: base of the rotary frequencies (modern layout).
    """

    vocab_size: int = 50257
    context: int = 1024
    layers: int = 12
    heads: int = 12
    width: int = 768
    kv_heads: int | None = None
    mlp_width: int | None = None
    layout: Literal["gpt2", "modern"] = "gpt2"
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width", "kv_heads", "mlp_width"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"GPTConfig: {name} must be a positive integer, got {value!r}")
        if self.layout not in ("gpt2", "modern"):
            raise ValueError(f"GPTConfig: layout must be gpt2 or modern, got {self.layout!r}")
        if self.width % self.heads:
            raise ValueError(f"GPTConfig: width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.kv_heads is not None and self.layout == "gpt2" and self.kv_heads != self.heads:
            raise ValueError(f"GPTConfig: kv_heads other than heads needs layout modern, got {self.kv_heads}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"GPTConfig: heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}")
        if self.layout == "modern" and self.head_dim % 2:
            raise ValueError(f"GPTConfig: rotary positions need an even head dimension, got {self.head_dim}")
        if not self.rope_theta > 0:
            raise ValueError(f"GPTConfig: rope_theta must be positive, got {self.rope_theta}")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def hidden(self) -> int:
        if self.mlp_width is not None:
            return self.mlp_width
        return 4 * self.width if self.layout == "gpt2" else -(-8 * self.width // (3 * 64)) * 64


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, by layer: [B, capacity, H_kv, D], of which `length` are filled."""

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[1]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores [B, H_kv, new, D] at the end; returns all there is, as [B, H_kv, length + new, D]."""
        end = self.length + key.shape[2]
        stored = []
        for cache, new in ((self.keys[layer], key), (self.values[layer], value)):
            cache[:, self.length : end] = new.transpose(1, 2)
            stored.append(cache[:, :end].transpose(1, 2))
        return stored[0], stored[1]


class SelfAttention(torch.nn.Module):
    """Causal self-attention with one projection for queries, keys and values."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        bias = config.layout == "gpt2"
        self.heads, self.key_heads, self.head_dim = config.heads, config.key_heads, config.head_dim
        self.qkv = nn.Linear(config.width, (self.heads + 2 * self.key_heads) * self.head_dim, bias)
        self.out = nn.Linear(config.width, config.width, bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None, cache: KVCache | None, layer: int) -> Tensor:
        b, s, _ = x.shape
        heads = self.qkv(x).view(b, s, -1, self.head_dim)
        q, k, v = split_heads(heads, [self.heads, self.key_heads, self.key_heads])
        if rotation is not None:
            q, k = ops.rotary(q, k, *rotation)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        y = ops.attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.key_heads)
        return self.out(y.transpose(1, 2).reshape(b, s, -1))


class MLP(torch.nn.Module):
    """down(gelu_tanh(up(x)))."""

    activation = "gelu_tanh"

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up = torch.nn.Linear(width, hidden)
        self.down = torch.nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return parts.mlp(x, self.up, self.down, activation=self.activation)


class Block(torch.nn.Module):
    """One layer: attention and MLP, each after a norm of the residual stream.

    It has no forward: norm1 is called for the block before, so that FSDP shards the parts and not the block as a whole.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm1, self.norm2 = _norm(config), _norm(config)
        self.attention = SelfAttention(config)
        self.mlp = (MLP if config.layout == "gpt2" else nn.GatedMLP)(config.width, config.hidden)

    def to_next_norm(
        self,
        normed: Tensor,
        stream: Tensor,
        norm_after: torch.nn.Module,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KVCache | None,
        layer: int,
    ) -> tuple[Tensor, Tensor]:
        """What follows norm1, and the norm after this block: its output, and the stream that it normed."""
        if cache is None and (found := self._at_once(normed, stream, norm_after, rotation)) is not None:
            return found
        normed, stream = self.norm2(self.attention(normed, rotation, cache, layer), stream)
        return norm_after(self.mlp(normed), stream)

    def _at_once(
        self, normed: Tensor, stream: Tensor, norm_after: torch.nn.Module, rotation: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor] | None:
        """As one function to autograd; None where that is not possible, or a part is not `untouched`."""
        attention, mlp = self.attention, self.mlp
        if not normed.is_cpu or torch.compiler.is_compiling():
            return None
        if not untouched(attention, SelfAttention) or not untouched(mlp, MLP, nn.GatedMLP):
            return None
        if not parts.plain(attention.qkv):
            return None
        return at_once(
            normed,
            stream,
            (self.norm2, norm_after),
            qkv=(attention.qkv.weight, attention.qkv.bias),
            out=attention.out,
            up=mlp.up,
            down=mlp.down,
            gate=mlp.gate if isinstance(mlp, nn.GatedMLP) else None,
            activation=mlp.activation,
            heads=attention.heads,
            head_dim=attention.head_dim,
            is_causal=True,
            rotation=rotation,
        )


def _norm(config: GPTConfig) -> torch.nn.Module:
    return nn.LayerNorm(config.width) if config.layout == "gpt2" else nn.RMSNorm(config.width, eps=1e-6)


class GPT(Stack):
    """A GPT with tied input and output embeddings. Its weights are drawn from torch's global generator."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.embedding = torch.nn.Embedding(config.vocab_size, config.width)
        self.positions = torch.nn.Embedding(config.context, config.width) if config.layout == "gpt2" else None
        self.blocks = torch.nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = _norm(config)
        if config.layout == "modern":
            cos, sin = _rotation(config)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """N(0, 0.02); what is added to the residual stream is scaled down by the number of additions (GPT-2)."""
        scaled = 0.02 / math.sqrt(2 * self.config.layers)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=scaled if name.endswith(("out.weight", "down.weight")) else 0.02)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(p)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Normed output of the last block, [B, S, width], for tokens [B, S] (int64) that follow those in `cache`."""
        start = 0 if cache is None else cache.length
        end = start + tokens.shape[1]
        if end > self.config.context:
            raise ValueError(f"GPT: {end} tokens are more than the context of {self.config.context}")
        blocks = cast(list[Block], list(self.blocks))
        x = parts.embedding(tokens, self.embedding)
        rotation = None
        if self.positions is not None:
            x = x + parts.rows(self.positions, start, end, tokens.device)
        else:
            rotation = self.cos[start:end], self.sin[start:end]
        normed, stream = blocks[0].norm1(x), x
        norms_after = [*(block.norm1 for block in blocks[1:]), self.norm]
        for i, (block, norm_after) in enumerate(zip(blocks, norms_after, strict=True)):
            normed, stream = self.run(block.to_next_norm, normed, stream, norm_after, rotation, cache, i)
        if cache is not None:
            cache.length = end
        return normed

    def forward(self, tokens: Tensor, targets: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """Logits, or the loss if there are targets.

        Args:
            tokens: [B, S], int64, at most `context` of them in a row.
            targets: [B, S], int64: the token after each, or -100 where there is no loss.
            reduction: of the loss: "mean", "sum" or "none".

        Returns:
            [B, S, vocab_size] logits, or the loss in float32 (a scalar; [B, S] for "none").
        """
        x = self.hidden(tokens)
        weight = parts.tied(self.embedding, self.config.vocab_size, x.device)
        if targets is None:
            return ops.linear(x, weight)
        return ops.linear_cross_entropy(x, weight, targets, reduction=reduction)

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations of forward and backward for one token of a sequence of `length`.

        6 for each weight of a product, and 6 for each product of causal attention (half of 12 length width a layer).
        """
        products = sum(p.numel() for n, p in self.named_parameters() if p.dim() == 2 and not n.startswith("positions"))
        return 6.0 * products + 6.0 * self.config.layers * self.config.width * length

    def new_cache(self, batch: int, dtype: torch.dtype | None = None) -> KVCache:
        """An empty cache for `context` tokens."""
        weight = next(p for p in self.parameters() if p.is_floating_point())
        shape = (batch, self.config.context, self.config.key_heads, self.config.head_dim)
        make = [weight.new_empty(shape, dtype=dtype or weight.dtype) for _ in range(2 * self.config.layers)]
        return KVCache(make[::2], make[1::2])

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Continues `tokens` [B, S] (S >= 1); returns [B, S + max_new_tokens].

        Args:
            temperature: divides the logits; 0 takes the likeliest token each time.
            top_k: sample among the k likeliest tokens only.
            top_p: sample among the fewest tokens whose probabilities reach p (Holtzman et al. 2020).
            seed: of the sampling; None: from torch's global generator.

        Past `context` tokens the older half is forgotten.
        """
        with packed_weights(self.parameters()):
            return torch.cat([tokens, *self.stream(tokens, max_new_tokens, temperature, top_k, top_p, seed)], dim=1)

    @torch.no_grad()
    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Iterator[Tensor]:
        """As `generate`, but yields each new token, [B, 1], as soon as it is there.

        Faster within `bmf.packed_weights(model.parameters())`, if no one changes them meanwhile.
        """
        if tokens.dim() != 2 or tokens.shape[1] < 1:
            raise ValueError(f"generate: tokens must be [B, S] with S >= 1, got {list(tokens.shape)}")
        check_options(temperature, top_k, top_p)
        generator = None if seed is None else torch.Generator(tokens.device).manual_seed(seed)
        context = self.config.context
        seen, cache = tokens[:, -context:], None
        for _ in range(max_new_tokens):
            if cache is None or cache.length == context:
                if cache is not None:
                    seen = seen[:, -(context // 2 or 1) :]
                device = tokens.device.type
                dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
                cache, new = self.new_cache(len(tokens), dtype), seen
            weight = parts.tied(self.embedding, self.config.vocab_size, tokens.device)
            logits = ops.linear(self.hidden(new, cache)[:, -1], weight)
            new = sample(logits.float(), temperature, top_k, top_p, generator)
            seen = torch.cat([seen, new], dim=1)
            yield new

    def load_hf_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the weights of a Hugging Face GPT-2 (GPT2LMHeadModel's or GPT2Model's state dict)."""
        state = {k.removeprefix("transformer."): v for k, v in state.items()}
        renamed = {}
        for ours, theirs, transpose in self._hf_names():
            if theirs not in state:
                raise ValueError(f"GPT: the state dict has no {theirs}; is it a GPT-2 of {self.config.layers} layers?")
            renamed[ours] = state[theirs].t() if transpose else state[theirs]
        try:
            self.load_state_dict(renamed)
        except RuntimeError as error:
            raise ValueError(f"GPT: the state dict does not fit {asdict(self.config)}: {error}") from None

    def hf_state_dict(self) -> dict[str, Tensor]:
        """This model's weights under the names of Hugging Face's GPT2LMHeadModel."""
        own = self.state_dict()
        state = {
            f"transformer.{theirs}": own[ours].t().contiguous() if transpose else own[ours]
            for ours, theirs, transpose in self._hf_names()
        }
        state["lm_head.weight"] = state["transformer.wte.weight"]
        return state

    def _hf_names(self) -> Iterator[tuple[str, str, bool]]:
        """(our name, theirs, whether theirs is transposed) for each weight."""
        if self.config.layout != "gpt2":
            raise ValueError(
                f"GPT: only layout gpt2 has a Hugging Face GPT-2 form, this model's is {self.config.layout}"
            )
        yield "embedding.weight", "wte.weight", False
        yield "positions.weight", "wpe.weight", False
        for i in range(self.config.layers):
            for ours, theirs in (("norm1", "ln_1"), ("norm2", "ln_2")):
                for part in ("weight", "bias"):
                    yield f"blocks.{i}.{ours}.{part}", f"h.{i}.{theirs}.{part}", False
            for ours, theirs in (
                ("attention.qkv", "attn.c_attn"),
                ("attention.out", "attn.c_proj"),
                ("mlp.up", "mlp.c_fc"),
                ("mlp.down", "mlp.c_proj"),
            ):
                yield f"blocks.{i}.{ours}.weight", f"h.{i}.{theirs}.weight", True
                yield f"blocks.{i}.{ours}.bias", f"h.{i}.{theirs}.bias", False
        for part in ("weight", "bias"):
            yield f"norm.{part}", f"ln_f.{part}", False


def _rotation(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles, [context, head_dim] (Su et al. 2021; halves of the head dimension paired)."""
    half = config.head_dim // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(config.context, dtype=torch.float64)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=1)
    return angle.cos().float(), angle.sin().float()

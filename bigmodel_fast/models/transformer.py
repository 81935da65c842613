"""The Transformer of "Attention Is All You Need" (Vaswani et al. 2017): an encoder, a decoder, and beam search.

Source, target and output share their embeddings. Sequences are packed one after the other ([tokens], with the starts of
the sequences), so there is no padding. The encoder's and decoder's weights have the names of torch.nn.Transformer's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import nn, ops
from ..nn import parts
from .layers import DecoderLayer, EncoderLayer, LayerShape, Stack


@dataclass
class TransformerConfig:
    """Shape of a Transformer.

    Args:
        vocab_size: number of tokens there are, of source and target together.
        context: most tokens a source or a target may have.
        layers: of the encoder, and again of the decoder.
        heads: attention heads; they divide width.
        width: of the residual stream.
        mlp_width: hidden width of the MLP. None: 4 width.
        norm_first: norm what goes into a sub-layer (pre-norm), not the sums of the residual stream (post-norm).
        dropout: share that training drops of what is added to the stream, and of the embeddings.
    """

    vocab_size: int = 32000
    context: int = 256
    layers: int = 6
    heads: int = 8
    width: int = 512
    mlp_width: int | None = None
    norm_first: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width", "mlp_width"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"TransformerConfig: {name} must be a positive integer, got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"TransformerConfig: width must be a multiple of heads, got {self.width} and {self.heads}")
        if self.width % 2:
            raise ValueError(f"TransformerConfig: width must be even for sinusoidal positions, got {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"TransformerConfig: dropout must lie in [0, 1), got {self.dropout}")

    @property
    def hidden(self) -> int:
        return self.mlp_width or 4 * self.width


def pack(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Sequences one after the other: tokens [tokens] int64 and where each begins, [sequences + 1] int32."""
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64, device=device)
    lengths = torch.tensor([0, *map(len, sequences)], device=device)
    return tokens, lengths.cumsum(0).to(torch.int32)


class Encoder(Stack):
    """Encoder layers and the norm after them."""

    def __init__(self, shape: LayerShape, layers: int):
        super().__init__()
        self.layers = torch.nn.ModuleList(EncoderLayer(shape) for _ in range(layers))
        self.norm = nn.LayerNorm(shape.width, eps=shape.eps)

    def forward(self, x: Tensor, starts: Tensor) -> Tensor:
        """[tokens, width] with the starts of the sequences."""
        for layer in self.layers:
            x = self.run(layer, x, starts)
        return self.norm(x)


class Decoder(Stack):
    """Decoder layers and the norm after them."""

    def __init__(self, shape: LayerShape, layers: int):
        super().__init__()
        self.layers = torch.nn.ModuleList(DecoderLayer(shape) for _ in range(layers))
        self.norm = nn.LayerNorm(shape.width, eps=shape.eps)

    def forward(self, x: Tensor, starts: Tensor, memory: Tensor, memory_starts: Tensor) -> Tensor:
        """[tokens, width] with the starts of the sequences, each of which attends to its own of memory's."""
        for layer in self.layers:
            x = self.run(layer, x, starts, memory, memory_starts)
        return self.norm(x)


class Transformer(torch.nn.Module):
    """An encoder and decoder. Its weights are drawn from torch's global generator."""

    table: Tensor

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = c = config
        self.embedding = torch.nn.Embedding(c.vocab_size, c.width)
        torch.nn.init.normal_(self.embedding.weight, std=c.width**-0.5)
        shape = LayerShape(c.width, c.heads, c.hidden, "relu", c.norm_first, dropout=c.dropout)
        self.encoder, self.decoder = Encoder(shape, c.layers), Decoder(shape, c.layers)
        self.register_buffer("table", sinusoids(c.context, c.width), persistent=False)

    def embed(self, tokens: Tensor, starts: Tensor) -> Tensor:
        """Embeddings times sqrt(width), plus positions: [tokens, width]."""
        begins = starts.to(torch.int64)
        lengths = begins.diff()
        if starts.is_cpu and len(lengths) and int(lengths.max()) > self.config.context:  # nobody waits for a GPU here
            raise ValueError(
                f"Transformer: {int(lengths.max())} tokens are more than the context of {self.config.context}"
            )
        first = begins[:-1].repeat_interleave(lengths, output_size=len(tokens))
        within = torch.arange(len(tokens), device=tokens.device) - first
        return self.embed_at(tokens, self.table[within])

    def embed_at(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Embeddings of tokens [...] at positions given as their sinusoids, [..., width] or [width]."""
        x = parts.embedding(tokens, self.embedding) * math.sqrt(self.config.width) + positions
        return ops.dropout(x, self.config.dropout if self.training else 0.0)

    def encode(self, source: Tensor, starts: Tensor) -> Tensor:
        """Source tokens [tokens] to the encoder's output [tokens, width]."""
        return self.encoder(self.embed(source, starts), starts)

    def forward(
        self,
        source: Tensor,
        source_starts: Tensor,
        target: Tensor,
        target_starts: Tensor,
        labels: Tensor | None = None,
        *,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits, or the loss if there are labels.

        Args:
            source: [source tokens], int64; sequences one after the other (see `pack`).
            source_starts: [sequences + 1], int32.
            target: [target tokens], int64: what the decoder sees, as many sequences.
            target_starts: [sequences + 1], int32.
            labels: [target tokens], int64: the token after each, or -100 where there is no loss.
            label_smoothing: share of a label spread evenly over the vocabulary (Szegedy et al. 2016).
            reduction: of the loss: "mean", "sum" or "none".

        Returns:
            [target tokens, vocab_size] logits, or the loss in float32 (a scalar; labels' shape for "none").
        """
        memory = self.encode(source, source_starts)
        x = self.decoder(self.embed(target, target_starts), target_starts, memory, source_starts)
        weight = parts.tied(self.embedding, self.config.vocab_size, x.device)
        if labels is None:
            return ops.linear(x, weight)
        return ops.linear_cross_entropy(x, weight, labels, label_smoothing=label_smoothing, reduction=reduction)

    def flops(self, source: float, target: float, source_length: float, target_length: float) -> float:
        """Floating-point operations of forward and backward, for so many tokens in sequences of such lengths.

        6 for each weight of a product, 12 for each product of attention (6 where it is causal).
        """
        c = self.config
        encoder = c.width * (4 * c.width + 2 * c.hidden)
        cross = 2 * c.width * c.width  # of each side
        attended = source * source_length + target * (source_length + target_length / 2)
        weights = source * (encoder + cross) + target * (encoder + cross)
        return c.layers * (6.0 * weights + 12.0 * c.width * attended) + 6.0 * target * c.width * c.vocab_size


def sinusoids(positions: int, width: int) -> Tensor:
    """[positions, width]: sin and cos in turn, of wavelengths from 2 pi to 10000 * 2 pi (equation in section 3.5)."""
    frequency = 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1).float()

"""BERT: an encoder that fills in masked tokens (Devlin et al. 2019); reads and writes Hugging Face's BertForMaskedLM.

Its layers normalise the sums of the residual stream (post-norm) and are those of models/layers.py. Of a batch that is
padded, the tokens there are go through the layers packed, and padding costs nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import nn, ops
from ..nn import parts
from .layers import EncoderLayer, LayerShape, Stack, StreamNorm

NORM_EPS = 1e-12


@dataclass
class BERTConfig:
    """Shape of a BERT.

    Args:
        vocab_size: number of tokens there are.
        context: most tokens a sequence may have.
        layers: encoder layers.
        heads: attention heads; they divide width.
        width: of the residual stream.
        mlp_width: hidden width of the MLP. None: 4 width.
        segments: kinds of text a sequence may be made of (token types); 0 where a caller names none.
        dropout: share that training drops of what is added to the stream, and of the weights of attention.
    """

    vocab_size: int = 30522
    context: int = 512
    layers: int = 12
    heads: int = 12
    width: int = 768
    mlp_width: int | None = None
    segments: int = 2
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "heads", "width", "mlp_width", "segments"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"BERTConfig: {name} must be a positive integer, got {value!r}")
        if self.width % self.heads:
            raise ValueError(f"BERTConfig: width must be a multiple of heads, got {self.width} and {self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"BERTConfig: dropout must lie in [0, 1), got {self.dropout}")

    @property
    def hidden(self) -> int:
        return self.mlp_width or 4 * self.width


class BERT(Stack):
    """A BERT with tied input and output embeddings. Its weights are drawn from torch's global generator."""

    def __init__(self, config: BERTConfig):
        super().__init__()
        self.config = c = config
        self.embedding = torch.nn.Embedding(c.vocab_size, c.width)
        self.positions = torch.nn.Embedding(c.context, c.width)
        self.segments = torch.nn.Embedding(c.segments, c.width)
        self.norm = StreamNorm(c.width, eps=NORM_EPS)
        shape = LayerShape(c.width, c.heads, c.hidden, "gelu", False, NORM_EPS, c.dropout, c.dropout)
        self.layers = torch.nn.ModuleList(EncoderLayer(shape) for _ in range(c.layers))
        self.transform = nn.Linear(c.width, c.width)
        self.transform_norm = nn.LayerNorm(c.width, eps=NORM_EPS)
        self.bias = torch.nn.Parameter(torch.zeros(c.vocab_size))
        for name, p in self.named_parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(p)

    def hidden(self, tokens: Tensor, segments: Tensor | None = None, lengths: Tensor | None = None) -> Tensor:
        """Output of the last layer, [B, S, width].

        Args:
            tokens: [B, S], int64, at most `context` of them in a row.
            segments: [B, S], int64, the kind of text each token belongs to. None: 0.
            lengths: [B], how many tokens of each sequence there are, at least 1; outputs behind them are zero.
        """
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(f"BERT: {length} tokens are more than the context of {self.config.context}")
        there = None
        if lengths is not None:
            there = torch.arange(length, device=tokens.device) < lengths.to(tokens.device)[:, None]
        where = parts.rows(self.positions, 0, length, tokens.device)
        if segments is None:
            kind = parts.rows(self.segments, 0, 1, tokens.device)
        else:
            kind = parts.embedding(segments, self.segments)
        x = self.norm(parts.embedding(tokens, self.embedding) + (where + kind))
        x = ops.dropout(x, self.config.dropout if self.training else 0.0)
        if there is None:
            for layer in self.layers:
                x = self.run(layer, x)
            return x
        packed = x[there]
        starts = torch.nn.functional.pad(there.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        for layer in self.layers:
            packed = self.run(layer, packed, starts)
        return packed.new_zeros(x.shape).masked_scatter(there[..., None], packed)

    def head(self, x: Tensor) -> Tensor:
        """[..., width], of which the product with the embeddings, plus the bias, is the logits."""
        return self.transform_norm(parts.linear(x, self.transform, activation="gelu"))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        lengths: Tensor | None = None,
        reduction: str = "mean",
    ) -> Tensor:
        """Logits, or the loss if there are targets.

        Args:
            tokens, segments, lengths: see `hidden`.
            positions: [B, P], int64: those whose logits or loss are wanted; the others never meet the vocabulary.
                None: all.
            targets: [B, P] ([B, S] without positions), int64: the token that belongs there, or -100 for no loss.
            reduction: of the loss: "mean", "sum" or "none".

        Returns:
            [B, P or S, vocab_size] logits, or the loss in float32 (a scalar; targets' shape for "none").
        """
        x = self.hidden(tokens, segments, lengths)
        if positions is not None:
            rows = torch.arange(len(tokens), device=tokens.device)[:, None] * tokens.shape[1]
            x = x.flatten(0, 1).index_select(0, (rows + positions).flatten()).view(*positions.shape, -1)
        x = self.head(x)
        weight = parts.tied(self.embedding, self.config.vocab_size, x.device)
        if targets is None:
            return ops.linear(x, weight, self.bias)
        return ops.linear_cross_entropy(x, weight, targets, bias=self.bias, reduction=reduction)

    def flops_per_token(self, length: int, predicted: float) -> float:
        """Floating-point operations of forward and backward for one token of a sequence of `length`.

        6 for each weight of a product, 12 for each product of attention; a share `predicted` meets the vocabulary.
        """
        c = self.config
        layers = c.layers * c.width * (4 * c.width + 2 * c.hidden)
        head = c.width * (c.width + c.vocab_size)
        return 6.0 * (layers + predicted * head) + 12.0 * c.layers * c.width * length

    # ---- Hugging Face ----

    def hf_config(self) -> dict[str, Any]:
        """Arguments of the transformers.BertConfig of this model."""
        c = self.config
        return {
            "vocab_size": c.vocab_size,
            "max_position_embeddings": c.context,
            "num_hidden_layers": c.layers,
            "num_attention_heads": c.heads,
            "hidden_size": c.width,
            "intermediate_size": c.hidden,
            "type_vocab_size": c.segments,
            "pad_token_id": None,  # every token is one
            "hidden_act": "gelu",
            "layer_norm_eps": NORM_EPS,
            "hidden_dropout_prob": c.dropout,
            "attention_probs_dropout_prob": c.dropout,
        }

    def load_hf_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes the weights of a Hugging Face BertForMaskedLM (activation gelu, absolute positions)."""
        ours = {}
        for name, theirs in self._hf_names():
            missing = [key for key in theirs if key not in state]
            if missing:
                raise ValueError(
                    f"BERT: the state dict has no {missing[0]}; is it a BertForMaskedLM of {self.config.layers} layers?"
                )
            ours[name] = torch.cat([state[key] for key in theirs])
        try:
            self.load_state_dict(ours)
        except RuntimeError as error:
            raise ValueError(f"BERT: the state dict does not fit {self.config}: {error}") from None

    def hf_state_dict(self) -> dict[str, Tensor]:
        """This model's weights under the names of Hugging Face's BertForMaskedLM."""
        own = self.state_dict()
        state: dict[str, Tensor] = {}
        for name, theirs in self._hf_names():
            state |= dict(zip(theirs, own[name].chunk(len(theirs)), strict=True))
        state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
        state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
        return state

    def _hf_names(self) -> Iterator[tuple[str, list[str]]]:
        """Our name of each weight, and the names of those that it is one behind the other, of Hugging Face's."""
        embeddings = "bert.embeddings"
        yield "embedding.weight", [f"{embeddings}.word_embeddings.weight"]
        yield "positions.weight", [f"{embeddings}.position_embeddings.weight"]
        yield "segments.weight", [f"{embeddings}.token_type_embeddings.weight"]
        yield "bias", ["cls.predictions.bias"]
        for part in ("weight", "bias"):
            yield f"norm.{part}", [f"{embeddings}.LayerNorm.{part}"]
            yield f"transform.{part}", [f"cls.predictions.transform.dense.{part}"]
            yield f"transform_norm.{part}", [f"cls.predictions.transform.LayerNorm.{part}"]
            for i in range(self.config.layers):
                own, theirs = f"layers.{i}", f"bert.encoder.layer.{i}"
                heads = [f"{theirs}.attention.self.{kind}.{part}" for kind in ("query", "key", "value")]
                yield f"{own}.self_attn.in_proj_{part}", heads
                yield f"{own}.self_attn.out_proj.{part}", [f"{theirs}.attention.output.dense.{part}"]
                yield f"{own}.norm1.{part}", [f"{theirs}.attention.output.LayerNorm.{part}"]
                yield f"{own}.linear1.{part}", [f"{theirs}.intermediate.dense.{part}"]
                yield f"{own}.linear2.{part}", [f"{theirs}.output.dense.{part}"]
                yield f"{own}.norm2.{part}", [f"{theirs}.output.LayerNorm.{part}"]

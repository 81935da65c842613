"""Encoder and decoder layers (Vaswani et al. 2017), with the parameters of torch.nn.TransformerEncoderLayer and
-DecoderLayer.

Tokens come packed, [tokens, width], with the sequences one after the other and `starts`, [sequences + 1] int32, saying
where each begins; so nothing is computed for padding. Sequences of one length may come as [B, S, width] without starts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import nn, ops
from ..nn import parts
from ..nn.parts import untouched
from ..ops._encoder_layer import Shape, Weights, encoder_layer
from ..ops._heads import split_heads

Sublayer = Callable[[Tensor, Tensor], Tensor]  # of its input and of what is added to its output


class Stack(torch.nn.Module):
    """A module that calls layers one after the other.

    Attributes:
        recompute: training keeps of each layer what goes into it, and runs it again in backward (Chen et al. 2016): the
            same bits, dropout included, in less memory and about a third more time. See `recompute_layers`.
    """

    recompute = False

    def run(self, layer: Callable[..., Any], *inputs: Any) -> Any:
        """layer(*inputs)."""
        if not (self.recompute and torch.is_grad_enabled()):
            return layer(*inputs)
        return checkpoint(layer, *inputs, use_reentrant=False)


def recompute_layers(model: torch.nn.Module, on: bool = True) -> None:
    """Sets `recompute` of every stack of layers in a GPT, BERT or Transformer."""
    for module in model.modules():
        if isinstance(module, Stack):
            module.recompute = on


@dataclass(frozen=True)
class LayerShape:
    """What layers of an encoder or decoder share.

    Args:
        width: of the residual stream.
        heads: attention heads; they divide the width.
        hidden: width of the MLP.
        activation: of the MLP, one of ops.mlp's.
        norm_first: norm what goes into attention and MLP (pre-norm), not their sums with the stream (post-norm).
        eps: added to variances by the norms.
        dropout: share that training drops of what attention and MLP add.
        attention_dropout: share that training drops of the weights of attention.
    """

    width: int
    heads: int
    hidden: int
    activation: str = "relu"
    norm_first: bool = False
    eps: float = 1e-5
    dropout: float = 0.0
    attention_dropout: float = 0.0


class StreamNorm(nn.LayerNorm):
    """A norm of the residual stream whose output is the stream: it keeps its dtype, float32, under autocast."""

    def forward(self, x: Tensor, residual: Tensor | None = None):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x, residual)


class Attention(torch.nn.Module):
    """Attention with the parameters of torch.nn.MultiheadAttention; subclasses say to what."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0, attention_dropout: float = 0.0):
        super().__init__()
        self.width, self.heads, self.head_dim = width, heads, width // heads
        self.dropout, self.attention_dropout = dropout, attention_dropout
        self.in_proj_weight = torch.nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = torch.nn.Parameter(torch.zeros(3 * width))
        self.out_proj = torch.nn.Linear(width, width)
        torch.nn.init.xavier_uniform_(self.in_proj_weight)
        torch.nn.init.zeros_(self.out_proj.bias)

    def out(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """[..., H D] to dropout(out_proj) + residual."""
        dropout = self.dropout if self.training else 0.0
        return parts.linear(y, self.out_proj, dropout_p=dropout, residual=residual)

    @property
    def weight_dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0


class SelfAttention(Attention):
    """Attention among the tokens of each sequence."""

    def forward(
        self, x: Tensor, residual: Tensor | None = None, starts: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """[B, S, width], or [tokens, width] with the starts of the sequences; plus the residual."""
        qkv = ops.linear(x, self.in_proj_weight, self.in_proj_bias)
        dropout = self.weight_dropout
        if starts is None:
            q, k, v = split_heads(qkv.view(*x.shape[:2], -1, self.head_dim), [self.heads] * 3)
            y = ops.attention(q, k, v, is_causal=is_causal, dropout_p=dropout).transpose(1, 2)
        else:
            q, k, v = qkv.view(-1, 3, self.heads, self.head_dim).unbind(1)
            y = ops.attention_varlen(q, k, v, starts, starts, is_causal=is_causal, dropout_p=dropout)
        return self.out(y.reshape(x.shape), residual)

    def step(self, x: Tensor, residual: Tensor | None, keys: Tensor, values: Tensor, length: int) -> Tensor:
        """One more token of each sequence, [B, width], after the `length` in keys and values [B, capacity, H, D]."""
        qkv = ops.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, keys[:, length], values[:, length] = qkv.view(-1, 3, self.heads, self.head_dim).unbind(1)
        k, v = (t[:, : length + 1].transpose(1, 2) for t in (keys, values))
        return self.out(ops.attention(q[:, :, None], k, v).reshape(x.shape), residual)


class CrossAttention(Attention):
    """Attention of a decoder's tokens to those of an encoder."""

    def _split(self, parameter: Tensor) -> tuple[Tensor, Tensor]:
        """The parts of the input projection for queries, and for keys and values."""
        query, both = parameter.split([self.width, 2 * self.width])
        return query, both

    def keys_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """[tokens, width] to keys and values, [tokens, H, D] each."""
        both = ops.linear(memory, self._split(self.in_proj_weight)[1], self._split(self.in_proj_bias)[1])
        keys, values = both.view(-1, 2, self.heads, self.head_dim).unbind(1)
        return keys, values

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None,
        keys_values: tuple[Tensor, Tensor],
        starts: Tensor,
        memory_starts: Tensor,
    ) -> Tensor:
        """[tokens, width], each attending to all keys of the sequence that its own belongs to; plus the residual."""
        query = ops.linear(x, self._split(self.in_proj_weight)[0], self._split(self.in_proj_bias)[0])
        q, (k, v) = query.view(-1, self.heads, self.head_dim), keys_values
        y = ops.attention_varlen(q, k, v, starts, memory_starts, dropout_p=self.weight_dropout)
        return self.out(y.reshape(x.shape), residual)


class Layer(torch.nn.Module):
    """What encoder and decoder layers share: the MLP, and how a sub-layer, its residual and its norm go together."""

    def __init__(self, shape: LayerShape):
        super().__init__()
        self.shape = shape
        self.self_attn = SelfAttention(shape.width, shape.heads, shape.dropout, shape.attention_dropout)
        self.linear1 = torch.nn.Linear(shape.width, shape.hidden)
        self.linear2 = torch.nn.Linear(shape.hidden, shape.width)
        self.norm1, self.norm2 = self.new_norm(), self.new_norm()
        for linear in (self.linear1, self.linear2):
            torch.nn.init.xavier_uniform_(linear.weight)
            torch.nn.init.zeros_(linear.bias)

    def new_norm(self) -> nn.LayerNorm:
        return (nn.LayerNorm if self.shape.norm_first else StreamNorm)(self.shape.width, eps=self.shape.eps)

    def around(self, norm: torch.nn.Module, sublayer: Sublayer, x: Tensor) -> Tensor:
        """norm(sublayer(x) + x), or sublayer(norm(x)) + x."""
        # A view, since torch.compile takes no tensor twice as the input of a function with a gradient of its own.
        return sublayer(norm(x), x) if self.shape.norm_first else norm(sublayer(x, x.view_as(x)))

    def mlp(self, x: Tensor, residual: Tensor) -> Tensor:
        dropout, activation = self.shape.dropout if self.training else 0.0, self.shape.activation
        return parts.mlp(x, self.linear1, self.linear2, activation=activation, dropout_p=dropout, residual=residual)


class EncoderLayer(Layer):
    """Self-attention and MLP."""

    def forward(self, x: Tensor, starts: Tensor | None = None) -> Tensor:
        """[B, S, width], or [tokens, width] with the starts of the sequences."""
        if not self.shape.norm_first and (y := self._at_once(x, starts)) is not None:
            return y
        x = self.around(self.norm1, lambda y, residual: self.self_attn(y, residual, starts), x)
        return self.around(self.norm2, self.mlp, x)

    def _at_once(self, x: Tensor, starts: Tensor | None) -> Tensor | None:
        """The layer as one function to autograd; None where that is not possible, or a part is not `untouched`."""
        if not x.is_cpu or torch.compiler.is_compiling():
            return None
        attention, norms = self.self_attn, (self.norm1, self.norm2)
        if not untouched(attention, SelfAttention) or not all(untouched(norm, StreamNorm) for norm in norms):
            return None
        out, in_proj = attention.out_proj, attention.in_proj_weight
        if type(in_proj) is not torch.nn.Parameter or not parts.plain(out, self.linear1, self.linear2):
            return None
        matrices = (*in_proj.chunk(3), out.weight, self.linear1.weight, self.linear2.weight)
        biases = (*attention.in_proj_bias.chunk(3), out.bias, self.linear1.bias, self.linear2.bias)
        scales = (self.norm1.weight, self.norm1.bias, self.norm2.weight, self.norm2.bias)
        shape = Shape(
            head_dim=attention.head_dim,
            scale=attention.head_dim**-0.5,
            activation=self.shape.activation,
            eps1=self.norm1.eps,
            eps2=self.norm2.eps,
            attention_dropout=attention.weight_dropout,
            dropout1=attention.dropout if attention.training else 0.0,
            dropout2=self.shape.dropout if self.training else 0.0,
        )
        return encoder_layer(x, Weights._make((*matrices, *biases, *scales)), shape, starts=starts)


class DecoderLayer(Layer):
    """Causal self-attention, attention to an encoder's output, and MLP."""

    def __init__(self, shape: LayerShape):
        super().__init__(shape)
        self.norm3 = self.new_norm()
        self.multihead_attn = CrossAttention(shape.width, shape.heads, shape.dropout, shape.attention_dropout)

    def forward(self, x: Tensor, starts: Tensor, memory: Tensor, memory_starts: Tensor) -> Tensor:
        """[tokens, width] with the starts of the sequences, as many as memory's."""

        def attend(y: Tensor, residual: Tensor) -> Tensor:
            return self.self_attn(y, residual, starts, is_causal=True)

        return self._after(attend, x, starts, self.multihead_attn.keys_values(memory), memory_starts)

    def step(
        self,
        x: Tensor,
        cache: tuple[Tensor, Tensor],
        length: int,
        starts: Tensor,
        keys_values: tuple[Tensor, Tensor],
        memory_starts: Tensor,
    ) -> Tensor:
        """One more token of each sequence, [B, width]; starts: where the sequences of each memory begin."""

        def attend(y: Tensor, residual: Tensor) -> Tensor:
            return self.self_attn.step(y, residual, *cache, length)

        return self._after(attend, x, starts, keys_values, memory_starts)

    def _after(
        self,
        attend: Sublayer,
        x: Tensor,
        starts: Tensor,
        keys_values: tuple[Tensor, Tensor],
        memory_starts: Tensor,
    ) -> Tensor:
        def attend_to_memory(y: Tensor, residual: Tensor) -> Tensor:
            return self.multihead_attn(y, residual, keys_values, starts, memory_starts)

        x = self.around(self.norm1, attend, x)
        x = self.around(self.norm2, attend_to_memory, x)
        return self.around(self.norm3, self.mlp, x)

"""Layers with norms before their parts (GPT's and ViT's) as one function to autograd."""

from typing import Any

import torch
from torch import Tensor

from .. import nn
from ..nn.parts import plain, plain_gated, untouched
from ..ops._pre_norm_layer import Shape, Weights, pre_norm_layer


def at_once(
    normed: Tensor,
    stream: Tensor,
    norms: tuple[Any, Any],
    *,
    qkv: tuple[Tensor, Tensor | None],
    out: torch.nn.Linear,
    up: torch.nn.Linear,
    down: torch.nn.Linear,
    activation: str,
    heads: int,
    head_dim: int,
    is_causal: bool,
    gate: torch.nn.Linear | None = None,
    rotation: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor] | None:
    """What a norm makes of the stream to what the norm behind the layer makes of it, and the stream there.

    None where that is not possible, or a norm or dense layer is not `untouched`.

    Args:
        normed, stream: [B, S, width]; the first norm's output, and what it normed.
        norms: the layer's second norm, and the one behind it.
        qkv: weight and bias of the projection to queries, keys and values.
        heads: of queries.
        up, down, gate: of the MLP; with a gate it is a gated one, without biases.
        rotation: cos and sin of rotary positions.
    """
    norm, norm_after = norms
    kind = type(norm)
    if not untouched(norm, nn.LayerNorm, nn.RMSNorm) or not untouched(norm_after, kind):
        return None
    if not plain(out) or not (plain(up, down) if gate is None else plain_gated(gate, up, down)):
        return None
    if norm.eps is None or norm_after.eps is None:
        return None
    rms = kind is nn.RMSNorm
    weights = Weights(
        qkv=qkv[0],
        out=out.weight,
        gate=None if gate is None else gate.weight,
        up=up.weight,
        down=down.weight,
        qkv_bias=qkv[1],
        out_bias=out.bias,
        up_bias=up.bias,
        down_bias=down.bias,
        norm=norm.weight,
        norm_bias=None if rms else norm.bias,
        norm_after=norm_after.weight,
        norm_after_bias=None if rms else norm_after.bias,
    )
    shape = Shape(heads, head_dim, is_causal, activation, rms, norm.eps, norm_after.eps)
    return pre_norm_layer(normed, stream, weights, shape, rotation)

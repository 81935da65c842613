"""linear_cross_entropy on NVIDIA GPUs: the loss of logits z = x W^T + b and its gradients, by chunks of tokens.

For each chunk: its logits by cuBLAS; one kernel that finds the losses and puts g, the gradient of the logits, in their
place (`cross_entropy.py`); then dx = g W, dW += g^T x and db += the sum of g's rows. dW and db are float32 and stay so
over all chunks. Beside the gradients, memory is needed for the logits of one chunk.

A chunk's cost that does not shrink with it is reading and writing dW, and reading W: chunks grow with W, within
bounds. On a mean or a sum the gradient of each token's loss is known in forward, which makes all gradients; nothing is
read back by the host, not even the number of tokens that count, so the products of tokens that are ignored are made as
others are: cuBLAS takes no number of rows that only the device knows. Their logits are not read, only overwritten by 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _dense, launch
from .cross_entropy import count_used, differentiate_in_place

LOGITS_BYTES = 128 << 20, 512 << 20  # of one chunk, for the smallest and the largest W
ROWS_MULTIPLE = 128  # chunks are whole numbers of cuBLAS's tiles
SCALE_COLUMNS = 4096


@triton.jit
def _scale(tensor, factor, count, COLUMNS: tl.constexpr):
    f = tl.load(factor)
    if f != 1.0:
        i = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        value = tl.load(tensor + i, mask=i < count, other=0.0).to(tl.float32)
        tl.store(tensor + i, (value * f).to(tensor.dtype.element_ty), mask=i < count)


def chunk_tokens(classes: int, width: int, element_size: int) -> int:
    """Tokens of a chunk: logits of a quarter of dW's size, within LOGITS_BYTES."""
    least, most = LOGITS_BYTES
    size = min(most, max(least, classes * width * 4 // 4))
    tokens = size // (classes * element_size)
    return max(1, tokens // ROWS_MULTIPLE * ROWS_MULTIPLE or tokens)


def _differentiate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor | None,
    options: tuple[int, float, float],
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Losses of all tokens, the gradients in `wants`, and which targets had the highest logit (1, else 0), [tokens].

    scale: gradient of the losses, one or one for each token.
    """
    tokens, width = x.shape
    classes = weight.shape[0]
    cast = weight.to(x.dtype)
    losses, correct = x.new_empty(2, tokens, dtype=torch.float32)
    dx = x.new_empty(tokens if wants[0] else 0, width)
    dweight = x.new_empty(classes if wants[1] else 0, width, dtype=torch.float32)
    dbias = x.new_zeros(classes if wants[2] else 0, dtype=torch.float32)
    if tokens == 0:
        dweight.zero_()
    chunk = chunk_tokens(classes, width, x.element_size())
    for first in range(0, tokens, chunk):
        part = slice(first, min(first + chunk, tokens))
        g = _dense.matmul(x[part], cast, bias)
        part_scale = scale[part] if scale is not None and scale.dim() == 1 else scale
        outputs = losses[part], correct[part]
        differentiate_in_place(g, target[part], *outputs, part_scale if any(wants) else None, *options)
        if wants[0]:
            torch.mm(g, cast, out=dx[part])
        if wants[1]:
            _dense.accumulate(dweight, g, x[part], fresh=first == 0)
        if wants[2]:
            _, _, sums = _dense.activation_backward(g, g, "none", out=None, want_bias=True, want_hidden=False)
            dbias += sums
    return losses, dx, dweight, dbias, correct


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    reduction: str,
    wants: list[bool],
):
    share = count_used(target, ignore_index).reciprocal()
    scale = share if reduction == "mean" else torch.ones_like(share)
    options = (ignore_index, label_smoothing, softcap)
    losses, *gradients, correct = _differentiate(x, weight, bias, target, scale, options, wants)
    return losses if reduction == "none" else losses.sum() * scale, *gradients, correct.sum() * share


def linear_cross_entropy_bwd(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    softcap: float,
    reduction: str,
    wants: list[bool],
):
    scale = dloss / count_used(target, ignore_index) if reduction == "mean" else dloss
    _, *gradients, _ = _differentiate(x, weight, bias, target, scale, (ignore_index, label_smoothing, softcap), wants)
    return tuple(gradients)


def scale_gradients(gradients: list[Tensor], factor: Tensor) -> None:
    """Multiplies each by a scalar on the device, in place; they are not touched, nor waited for, if it is 1."""
    for t in gradients:
        grid = (triton.cdiv(t.numel(), SCALE_COLUMNS),)
        launch.run(_scale, grid, (t, factor, t.numel()), {"COLUMNS": SCALE_COLUMNS}, warps=8)


OPERATORS = {
    "linear_cross_entropy_fwd": linear_cross_entropy_fwd,
    "linear_cross_entropy_bwd": linear_cross_entropy_bwd,
}

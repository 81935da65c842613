"""embedding on NVIDIA GPUs: out[i] = weight[token[i]], and dweight[v] = the sum of dout[i] over i with token[i] = v.

weight [classes, width], out and dout [tokens, width], rows contiguous; a token that is no class gives a row of NaN and
adds to no gradient. Forward moves each byte once.

Backward sorts the tokens, and with them their places, so that each class has a stretch of neighbours, and adds up each
stretch in an order that the tokens alone decide: nothing is added to memory that another program writes, and every row
of dweight is written once, zeros included. A program to a class would take long over one that has most tokens, padding
say; so blocks of BLOCK sorted tokens that are all of one class are summed first, by a program each, and a class then
adds its whole blocks to the tokens before and after them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

BLOCK = 128  # sorted tokens: no program adds more than 2 BLOCK rows and tokens / BLOCK sums
WARPS = 4


@triton.jit
def _forward(token, weight, out, tokens, classes, width, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.load(token + row, mask=row < tokens, other=0)
    valid = (t >= 0) & (t < classes)
    inside = (row < tokens)[:, None] & (column < width)[None, :]
    value = tl.load(weight + t[:, None] * stride + column[None, :], mask=inside & valid[:, None], other=float("nan"))
    tl.store(out + row[:, None] * width + column[None, :], value, mask=inside)


@triton.jit
def _add_rows(acc, grad, order, first, last, column, width, stride, ROWS: tl.constexpr):
    """acc [ROWS, COLUMNS] and the gradients of sorted tokens [first, last)."""
    for start in range(first, last, ROWS):
        i = start + tl.arange(0, ROWS)
        row = tl.load(order + i, mask=i < last, other=0)
        inside = (i < last)[:, None] & (column < width)[None, :]
        acc += tl.load(grad + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _block_sums(
    grad, order, sorted_token, sums, width, stride, BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Blocks of several classes are left out: no class reads their sums."""
    block = tl.program_id(0).to(tl.int64)
    first = block * BLOCK
    if tl.load(sorted_token + first) == tl.load(sorted_token + first + BLOCK - 1):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        acc = _add_rows(acc, grad, order, first, first + BLOCK, column, width, stride, ROWS)
        tl.store(sums + block * width + column, tl.sum(acc, axis=0), mask=column < width)


@triton.jit
def _backward(
    grad, order, boundaries, sums, grad_weight, width, stride,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    of = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.load(boundaries + of)
    last = tl.load(boundaries + of + 1)
    first_block = tl.cdiv(first, BLOCK)
    last_block = last // BLOCK
    before = tl.minimum(first_block * BLOCK, last)
    after = tl.maximum(last_block * BLOCK, before)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc = _add_rows(acc, grad, order, first, before, column, width, stride, ROWS)
    for start in range(first_block, last_block, ROWS):
        block = start + tl.arange(0, ROWS)
        inside = (block < last_block)[:, None] & (column < width)[None, :]
        acc += tl.load(sums + block[:, None] * width + column[None, :], mask=inside, other=0.0)
    acc = _add_rows(acc, grad, order, after, last, column, width, stride, ROWS)
    value = tl.sum(acc, axis=0).to(grad_weight.dtype.element_ty)
    tl.store(grad_weight + of * width + column, value, mask=column < width)


def choose(width: int) -> launch.Rows:
    """16 elements a thread, at most 1 KiB of bfloat16 side by side."""
    columns = min(512, launch.power_of_two(width))
    return launch.Rows(min(BLOCK, 2048 // columns), columns, WARPS)


def embedding_fwd(token: Tensor, weight: Tensor) -> Tensor:
    weight = launch.row_matrix(weight)
    (classes, width), tokens = weight.shape, token.numel()
    out = weight.new_empty(tokens, width)
    choice = choose(width)
    launch.run(
        _forward,
        (triton.cdiv(tokens, choice.rows), triton.cdiv(width, choice.columns)),
        (token.contiguous(), weight, out, tokens, classes, width, weight.stride(0)),
        {"ROWS": choice.rows, "COLUMNS": choice.columns},
        choice.warps,
    )
    return out


def embedding_bwd(grad_out: Tensor, token: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    grad_out = launch.row_matrix(grad_out)
    tokens, width = grad_out.shape
    grad_weight = grad_out.new_empty((classes, width), dtype=dtype)
    # What is no class goes to the ends; 32 bits take half the passes of a radix sort.
    small = torch.int32 if classes < 2**31 - 1 else torch.int64
    sorted_token, order = token.clamp(-1, classes).to(small).sort(stable=True)
    bounds = torch.arange(classes + 1, dtype=small, device=token.device)
    boundaries = torch.searchsorted(sorted_token, bounds)
    blocks = tokens // BLOCK
    sums = grad_out.new_empty((blocks, width), dtype=torch.float32)
    choice = choose(width)
    strips = triton.cdiv(width, choice.columns)
    constants = {"BLOCK": BLOCK, "ROWS": choice.rows, "COLUMNS": choice.columns}
    stride = grad_out.stride(0)
    arguments = (grad_out, order, sorted_token, sums, width, stride)
    launch.run(_block_sums, (blocks, strips), arguments, constants, choice.warps)
    arguments = (grad_out, order, boundaries, sums, grad_weight, width, stride)
    launch.run(_backward, (classes, strips), arguments, constants, choice.warps)
    return grad_weight


OPERATORS = {"embedding_fwd": embedding_fwd, "embedding_bwd": embedding_bwd}

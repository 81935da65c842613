"""embedding: a gradient larger than a cache, which is written past it."""

import pytest
import torch

from bigmodel_fast import ops


@pytest.mark.parametrize("width", [256, 250])  # whole registers, and rows that end within one
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_gradient(dtype: torch.dtype, width: int) -> None:
    classes = (26 << 20) // (width * dtype.itemsize)
    token = torch.randint(classes, (64,), generator=torch.Generator().manual_seed(0))
    token[:8] = token[8:16]
    weight = torch.zeros(classes, width, dtype=dtype, requires_grad=True)
    grad_out = torch.randint(-8, 8, (64, width)).to(dtype)  # whose sums are exact
    ops.embedding(token, weight).backward(grad_out)
    assert torch.equal(weight.grad, torch.zeros_like(weight).index_add_(0, token, grad_out))  # type: ignore[arg-type]

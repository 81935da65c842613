"""Outputs of operators may be changed in place, as models do that blank out padding."""

import pytest
import torch
from torch import Tensor

from bigmodel_fast import ops

X, W, V = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 3, 8), (8, 8), (8,)))
CASES = {
    "linear": lambda x, w, v: ops.linear(x, w, v, activation="relu"),
    "mlp": lambda x, w, v: ops.mlp(x, w, v, w, v),
    "gated_mlp": lambda x, w, v: ops.gated_mlp(x, w, w, w),
    "dropout": lambda x, w, v: ops.dropout(x, 0.0, residual=x),
    "embedding": lambda x, w, v: ops.embedding(torch.tensor([[1, 2, 3], [4, 5, 5]]), w),
    "layer_norm": lambda x, w, v: ops.layer_norm(x, v, v),
    "rms_norm": lambda x, w, v: ops.rms_norm(x, v),
}


@pytest.mark.parametrize("op", CASES)
def test_what_is_blanked_out_has_no_gradient(op: str) -> None:
    def gradients(blank) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (X, W, V)]
        y = blank(CASES[op](*inputs))
        found = torch.autograd.grad((y * X).sum(), inputs, allow_unused=True)
        return [g for g in found if g is not None]

    present = torch.tensor([[True, True, False], [True, False, False]])

    def in_place(y: Tensor) -> Tensor:
        y[~present] = 0
        return y

    for a, b in zip(gradients(in_place), gradients(lambda y: y * present[..., None]), strict=True):
        torch.testing.assert_close(a, b)

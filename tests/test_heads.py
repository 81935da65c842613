"""project_heads: what several dense layers make of one input, by one operator and without putting weights together."""

import numerics
import pytest
import torch
from torch import Tensor

import bigmodel_fast as bmf
from bigmodel_fast.ops._heads import project_heads

B, S, WIDTH, DIM = 3, 40, 96, 16
HEADS = (6, 2, 3)


def layers(dtype: torch.dtype, *without_bias: int) -> tuple[list[Tensor], list[Tensor | None]]:
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(h * DIM, WIDTH, generator=generator).div(10).to(dtype).requires_grad_() for h in HEADS]
    biases = [torch.randn(h * DIM, generator=generator).to(dtype).requires_grad_() for h in HEADS]
    return weights, [None if i in without_bias else b for i, b in enumerate(biases)]


def results(dtype: torch.dtype, weight_dtype: torch.dtype, function=project_heads) -> list[Tensor]:
    """Heads and gradients; biases[1] is absent."""
    weights, biases = layers(weight_dtype, 1)
    x = torch.randn(B, WIDTH, S, generator=torch.Generator().manual_seed(0)).mT.to(dtype).requires_grad_()
    heads = function(x, weights, biases, DIM)
    sum((h.float() * h.detach().float().cos()).sum() for h in heads).backward()
    return [*heads, *(t.grad for t in (x, *weights, *biases) if t is not None)]


def plain(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], dim: int) -> list[Tensor]:
    pairs = zip(weights, biases, strict=True)
    made = (torch.nn.functional.linear(x, w.to(x.dtype), b if b is None else b.to(x.dtype)) for w, b in pairs)
    return [y.view(B, S, -1, dim).transpose(1, 2) for y in made]


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_near_as_eager(dtype: torch.dtype, weight_dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setitem(bmf._dispatch.FEWEST, "linear", (0, "multiply-adds in float32"))
    bmf.explain(reset=True)
    found, eager = results(dtype, weight_dtype), results(dtype, weight_dtype, plain)
    assert ("linear", "native") in {(c.op, c.path) for c in bmf.explain().calls}
    exact = results(torch.float64, torch.float64, plain)
    for i, (a, b, c) in enumerate(zip(found, eager, exact, strict=True)):
        numerics.assert_close(a, b, c, numerics.BACKWARD, f"result {i}")


def test_autocast_and_frozen_layers() -> None:
    """A float32 input gets a gradient that was never rounded to bfloat16; what needs no gradient gets none."""
    weights, biases = layers(torch.float32)
    weights[1].requires_grad_(False)
    x = torch.randn(B, S, WIDTH).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        heads = project_heads(x, weights, biases, DIM)
    assert {h.dtype for h in heads} == {torch.bfloat16}
    heads[0].sum().backward()  # the others have no gradient
    assert x.grad is not None
    assert x.grad.dtype is torch.float32
    assert not torch.equal(x.grad, x.grad.bfloat16().float())
    assert weights[1].grad is None
    assert [w.grad.any() for w in (weights[0], weights[2])] == [True, False]  # type: ignore[union-attr]


@pytest.mark.parametrize("wanted", [True, False])
def test_raw_operators(wanted: bool) -> None:
    x, dy = torch.randn(7, WIDTH), [torch.randn(7, 20)[:, :n] for n in (16, 20)]
    weights, biases = [torch.randn(n, WIDTH) for n in (16, 20)], [torch.randn(16), None]
    raw, checks = torch.ops.bigmodel_fast, ("test_schema", "test_faketensor")
    torch.library.opcheck(raw.linears_fwd.default, (x, weights, biases), test_utils=checks)
    wants = [wanted, True, False, not wanted, True]
    torch.library.opcheck(raw.linears_bwd.default, (dy, x, weights, torch.float32, wants), test_utils=checks)
    with pytest.raises(RuntimeError, match="up to 4 layers"):
        raw.linears_bwd(dy, x, weights, torch.float32, wants[1:])

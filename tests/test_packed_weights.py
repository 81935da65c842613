"""packed_weights: the same results from weights that are packed once, and no copy outlives its block."""

import pytest
import torch

import bigmodel_fast as bmf
from bigmodel_fast import _C, ops

DTYPES = [torch.float32, torch.bfloat16]


def weight(*shape: int) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)


def linear(x, w):
    return ops.linear(x, w["a"])


def mlp(x, w):
    return ops.mlp(x, w["a"], None, w["b"], None)


def gated_mlp(x, w):
    return ops.gated_mlp(x, w["a"], w["c"], w["b"])


def linear_cross_entropy(x, w):
    return ops.linear_cross_entropy(x, w["a"], torch.arange(x.shape[0]) % 70)


@pytest.fixture
def weights() -> dict[str, torch.nn.Parameter]:
    torch.manual_seed(0)
    return {"a": weight(70, 33), "b": weight(33, 70), "c": weight(70, 33)}


def results(function, dtype: torch.dtype, weights, seed: int = 0) -> list[torch.Tensor]:
    """Output and gradients."""
    x = torch.randn(50, 33, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        y = function(x, weights)
    grads = torch.autograd.grad(y.float().sum(), [x, *weights.values()], allow_unused=True)
    return [y.detach(), *(g for g in grads if g is not None)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize("isa", _C.supported_cpu_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", [linear, mlp, gated_mlp, linear_cross_entropy])
def test_same_bits_and_packed_once(function, dtype, isa, weights) -> None:
    before = _C.cpu_isa()
    _C.set_cpu_isa(isa)
    try:
        expected = [results(function, dtype, weights, seed) for seed in range(3)]
        with bmf.packed_weights(weights.values()):
            sizes = set()
            for seed in range(3):
                assert same(results(function, dtype, weights, seed), expected[seed])
                sizes.add(_C.packed_weights_bytes())
            assert len(sizes) == 1
            assert sizes.pop() > 0
    finally:
        _C.set_cpu_isa(before)
    assert _C.packed_weights_bytes() == 0


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_few_rows_are_as_near_as_without(rows: int, weights) -> None:
    x = torch.randn(rows, 33)
    exact = [torch.nn.functional.linear(x.double(), weights[n].double()) for n in "ac"]
    exact = (torch.nn.functional.silu(exact[0]) * exact[1]) @ weights["b"].double().T
    with bmf.packed_weights(weights.values()), torch.no_grad():
        torch.testing.assert_close(gated_mlp(x, weights), exact.float(), rtol=1e-5, atol=1e-5)


def test_weights_changed_between_blocks_are_seen(weights) -> None:
    for _ in range(2):
        with bmf.packed_weights(weights.values()):
            inside = results(mlp, torch.float32, weights)
        assert same(inside, results(mlp, torch.float32, weights))
        with torch.no_grad():
            weights["a"].mul_(-2)


def test_a_change_within_the_block_is_an_error(weights) -> None:
    @bmf.packed_weights(weights.values())
    def change() -> None:
        results(mlp, torch.float32, weights)
        with torch.no_grad():
            weights["b"].add_(1)

    with pytest.raises(RuntimeError, match=r"shape \[33, 70\] was changed"):
        change()
    assert _C.packed_weights_bytes() == 0


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_an_optimizer_step_within_the_block_is_an_error(name: str, weights) -> None:
    optimizer = getattr(bmf.optim, name)(weights.values(), lr=0.1)
    weights["a"].grad = torch.ones(70, 33)
    with pytest.raises(RuntimeError, match="was changed"), bmf.packed_weights(weights.values()):
        optimizer.step()


def test_weights_that_were_not_named_are_packed_anew(weights) -> None:
    """Weights that are computed in the block may have the address of those before them."""
    with bmf.packed_weights([weights["b"]]):
        for factor in (1.0, 2.0, 3.0):
            made = {**weights, "a": weights["a"].detach() * factor}
            x = torch.ones(50, 33)
            torch.testing.assert_close(linear(x, made), x @ made["a"].T)
            del made


def test_blocks_may_be_nested_and_weights_shared(weights) -> None:
    expected = results(linear, torch.float32, weights)
    with bmf.packed_weights(weights.values()):
        results(linear, torch.float32, weights)
        size = _C.packed_weights_bytes()
        with bmf.packed_weights([weights["a"], weights["a"]]):
            assert same(results(linear, torch.float32, weights), expected)
        assert _C.packed_weights_bytes() == size
        assert same(results(linear, torch.float32, weights), expected)
    assert _C.packed_weights_bytes() == 0


def test_an_exception_ends_the_block(weights) -> None:
    @bmf.packed_weights(weights.values())
    def fail() -> None:
        results(linear, torch.float32, weights)
        raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert _C.packed_weights_bytes() == 0


def test_what_cannot_be_packed_is_passed_over() -> None:
    others = [torch.zeros(3), torch.zeros(0, 4), torch.zeros(2, 2, device="meta"), torch.eye(3).to_sparse()]
    with bmf.packed_weights(others):
        x = torch.ones(50, 4)
        assert ops.linear(x, others[1]).shape == (50, 0)
        assert torch.equal(ops.linear(x, torch.eye(4)), x)
        assert _C.packed_weights_bytes() == 0

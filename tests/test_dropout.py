"""Dropout of an operator's output: how much, where, the same in backward, and the same whether fused or not."""

import pytest
import torch

import bigmodel_fast as bmf
from bigmodel_fast import _C, _dispatch, ops

DTYPES = [torch.float32, torch.bfloat16]


def choices(rows: int, width: int, p: float, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    return ops.dropout(torch.ones(rows, width), p) > 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_drops_the_share_it_was_told_to_independently(p: float) -> None:
    rows, width = 500, 400
    kept = choices(rows, width, p, 0)
    spread = 5 * (p * (1 - p)) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < spread / (rows * width) ** 0.5
    assert ((kept.double().mean(0) - (1 - p)).abs() < spread / rows**0.5).all()
    assert ((kept.double().mean(1) - (1 - p)).abs() < spread / width**0.5).all()
    for other in (kept.roll(1, 0), kept.roll(1, 1), kept.roll(16, 1), kept.roll(128, 1), choices(rows, width, p, 1)):
        agree = (kept == other).double().mean()  # of independent choices: p^2 + (1 - p)^2
        expected = p * p + (1 - p) ** 2
        assert abs(agree - expected) < 5 * (expected * (1 - expected) / (rows * width)) ** 0.5


@pytest.mark.parametrize("isa", _C.supported_cpu_isas())
def test_the_choices_do_not_depend_on_instruction_set_or_threads(isa: str) -> None:
    expected, before, threads = choices(37, 301, 0.3, 3), _C.cpu_isa(), torch.get_num_threads()
    _C.set_cpu_isa(isa)
    torch.set_num_threads(3)
    try:
        assert torch.equal(choices(37, 301, 0.3, 3), expected)
    finally:
        _C.set_cpu_isa(before)
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_drops_the_same(dtype: torch.dtype) -> None:
    x = torch.randn(31, 77).to(dtype).requires_grad_()
    residual = torch.randn(31, 77, requires_grad=True)
    y = ops.dropout(x, 0.4, residual=residual)
    assert y.dtype is torch.float32
    dy = torch.randn(31, 77)
    dx, dresidual = torch.autograd.grad(y, [x, residual], dy)
    dropped = (y == residual).detach()
    assert 0.3 < dropped.double().mean() < 0.5
    assert torch.equal(dresidual, dy)
    torch.testing.assert_close(dx, torch.where(dropped, 0.0, dy / 0.6).to(dtype), rtol=1e-2, atol=0)


def weights(*shapes: tuple[int, int]) -> list[torch.Tensor]:
    return [(torch.randn(s) * s[1] ** -0.5).requires_grad_() for s in shapes]


FUSED = {
    "linear": (lambda x, w, **o: ops.linear(x, w[0], **o), [(130, 33)]),
    "mlp": (lambda x, w, **o: ops.mlp(x, w[0], None, w[1], None, **o), [(70, 33), (130, 70)]),
    "gated_mlp": (lambda x, w, **o: ops.gated_mlp(x, *w, **o), [(70, 33), (70, 33), (130, 70)]),
}


@pytest.mark.parametrize("rows", [3, 50])
@pytest.mark.parametrize("stream", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_fused_is_dropout_after_it(name: str, dtype: torch.dtype, stream: torch.dtype | None, rows: int) -> None:
    function, shapes = FUSED[name]
    torch.manual_seed(0)
    x, w = torch.randn(rows, 33).to(dtype).requires_grad_(), weights(*shapes)
    if dtype is torch.float32:
        w = [t.detach().to(dtype).requires_grad_() for t in w]
    residual = None if stream is None else torch.randn(rows, 130).to(stream).requires_grad_()
    inputs = [x, *w, *([] if residual is None else [residual])]

    def run(call):
        torch.manual_seed(7)
        y = call()
        generator = torch.Generator().manual_seed(1)
        return y, torch.autograd.grad(y, inputs, torch.randn(y.shape, generator=generator).to(y.dtype))

    y, grads = run(lambda: function(x, w, dropout_p=0.3, residual=residual))
    expected, expected_grads = run(lambda: ops.dropout(function(x, w), 0.3, residual=residual))
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=2 * ulp, atol=4 * ulp)
    for a, b in zip(grads, expected_grads, strict=True):
        assert torch.equal(a, b)


def test_nothing_to_do_is_nothing_done() -> None:
    x = torch.randn(3, 5)
    assert ops.dropout(x, 0.0) is x
    assert torch.equal(ops.dropout(x, 1.0), torch.zeros(3, 5))


def test_few_elements_go_to_plain_torch_and_it_says_so(monkeypatch) -> None:
    monkeypatch.undo()
    least, _ = _dispatch.FEWEST["dropout"]
    bmf.explain(reset=True)
    ops.dropout(torch.ones(1, least - 1), 0.5)
    ops.dropout(torch.ones(1, least), 0.5)
    calls = bmf.explain(reset=True).calls
    assert [(c.path, c.reason) for c in calls] == [("native", ""), ("reference", f"fewer than {least} elements")]


def test_a_compiled_call_draws_anew_each_time() -> None:
    compiled = torch.compile(lambda x: ops.linear(x, torch.eye(64), dropout_p=0.5), fullgraph=True, backend="aot_eager")
    x = torch.ones(64, 64)
    assert not torch.equal(compiled(x), compiled(x))

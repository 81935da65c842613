"""Calls so small that plain torch takes them: the same results and errors as the kernel's, never within a graph."""

import pytest
import torch
from compare import assert_matches, differentiate
from specs import Error, Sample, Spec, all_specs, case_id, cases

import bigmodel_fast as bmf
from bigmodel_fast import _dispatch

handed_over = [spec for spec in all_specs() if spec.name in _dispatch.FEWEST]
each_spec = pytest.mark.parametrize("spec", handed_over, ids=case_id)
with_gradient = pytest.mark.parametrize(
    "spec", [s for s in handed_over if s.name not in ("embedding", "rms_norm")], ids=case_id
)


@pytest.fixture
def as_users_have_it(_as_started, monkeypatch):
    monkeypatch.undo()


def small(spec: Spec) -> Sample:
    return next(s for s in spec.samples if s.covered)


def reasons(op: str) -> set[tuple[str, str]]:
    return {(call.path, call.reason) for call in bmf.explain().calls if call.op == op}


def reason(op: str) -> str:
    least, what = _dispatch.FEWEST[op]
    return f"fewer than {least} {what}"


@with_gradient
@pytest.mark.parametrize("context", [None, torch.bfloat16], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
def test_results_are_the_kernels(spec: Spec, dtype: torch.dtype, context, monkeypatch) -> None:
    sample = small(spec)
    call = (sample.tensors(dtype, torch.float32), sample.options, sample.wanted)
    within = None if context is None else torch.autocast("cpu", context)
    expected, expected_grads = differentiate(spec.op, *call, context=within)
    monkeypatch.setattr(_dispatch, "FEWEST", {op: (1 << 40, what) for op, (_, what) in _dispatch.FEWEST.items()})
    bmf.explain(reset=True)
    outputs, grads = differentiate(spec.op, *call, context=within)
    if context is None and (spec.name != "linear" or dtype is torch.float32):
        assert {path for path, _ in reasons(spec.name)} == {"reference"}
    assert [(y.dtype, y.shape) for y in outputs] == [(y.dtype, y.shape) for y in expected]
    assert {n: g.dtype for n, g in grads.items()} == {n: g.dtype for n, g in expected_grads.items()}
    if context is None:
        assert_matches(spec, sample, call[0])


@pytest.mark.parametrize(("spec", "error"), [c for c in cases("errors") if c[0] in handed_over], ids=case_id)
def test_errors_are_the_same(spec: Spec, error: Error, as_users_have_it) -> None:
    sample = spec.samples[0]
    with pytest.raises(error.type) as raised:
        spec.op(**{**sample.tensors(torch.float32), **sample.options, **error.changes})
    assert str(raised.value).startswith(f"{spec.name}: {error.argument}")


@each_spec
def test_never_within_a_graph(spec: Spec, as_users_have_it) -> None:
    torch._dynamo.reset()
    sample, graphs = small(spec), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda **arguments: spec.op(**arguments), fullgraph=True, backend=backend)
    compiled(**sample.tensors(torch.float32), **sample.options)
    called = {str(node.target) for node in graphs[0].graph.nodes}
    assert any("bigmodel_fast" in name or "autograd_function_apply" in name for name in called), called


def test_says_how_few() -> None:
    x, weight = torch.randn(1, 768), torch.ones(768)
    bmf.explain(reset=True)
    bmf.ops.layer_norm(x, weight, None)
    assert reasons("layer_norm") == {("native", "")}


@pytest.mark.parametrize("grad", [False, True])
def test_some_gradients_are_never_left_to_torch(grad: bool, as_users_have_it) -> None:
    table = torch.randn(5, 3)
    bmf.explain(reset=True)
    with torch.set_grad_enabled(grad):
        x = bmf.ops.embedding(torch.tensor([1]), table.requires_grad_())
        y = bmf.ops.rms_norm(x, torch.ones(3))
    assert torch.equal(x, table[1:2])
    torch.testing.assert_close(y, table[1:2] * (table[1:2].square().mean() + 1e-6).rsqrt())
    for op in ("embedding", "rms_norm"):
        assert reasons(op) == {("native", "") if grad else ("reference", reason(op))}


def test_forced_kernels_are_never_handed_over(as_users_have_it, monkeypatch) -> None:
    monkeypatch.setattr(_dispatch, "_forced", "native")
    bmf.explain(reset=True)
    bmf.ops.layer_norm(torch.randn(1, 5), None, None)
    bmf.ops.linear(torch.randn(1, 5), torch.randn(3, 5))
    assert reasons("layer_norm") | reasons("linear") == {("native", "")}


def test_float16_autocast_changes_the_dtype_all_the_same(as_users_have_it) -> None:
    with torch.autocast("cpu", torch.float16):
        assert bmf.ops.layer_norm(torch.randn(1, 5), None, None).dtype is torch.float16

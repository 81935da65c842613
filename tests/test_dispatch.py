"""Operators within PyTorch: schemas and fake kernels, torch.compile, torch.func, checkpointing, autocast, threads."""

import os
import subprocess
import sys

import pytest
import torch
from compare import as_tuple, assert_matches, assert_same, differentiate, forward
from specs import Sample, Spec, all_specs, case_id, cases
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import bigmodel_fast as bmf
from bigmodel_fast import ops

each_spec = pytest.mark.parametrize("spec", all_specs(), ids=case_id)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)


class RawCalls(TorchDispatchMode):
    """Records the calls of torch.ops.bigmodel_fast.*."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns_tensors = any("Tensor" in str(r.type) for r in function._schema.returns)  # find_bad_target reads values
        if function.namespace == "bigmodel_fast" and returns_tensors:
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@each_spec
@each_dtype
def test_opcheck(spec: Spec, dtype: torch.dtype) -> None:
    sample = next(s for s in spec.samples[1:] if s.covered)
    with RawCalls() as raw:
        differentiate(spec.op, sample.tensors(dtype), sample.options, sample.wanted)
    names = {function._schema.name for function, _, _ in raw.calls}
    assert any(name.endswith("_fwd") for name in names), f"no kernel ran: {names}"
    for function, args, kwargs in raw.calls:
        detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, args)
        torch.library.opcheck(function, detached, kwargs, test_utils=("test_schema", "test_faketensor"))


@each_spec
def test_compile_full_graph(spec: Spec) -> None:
    torch._dynamo.reset()
    sample = spec.samples[1]
    call = (sample.tensors(torch.float32), sample.options, sample.wanted)
    compiled = torch.compile(lambda **arguments: spec.op(**arguments), fullgraph=True, backend="aot_eager")
    (outputs, grads), (expected, expected_grads) = differentiate(compiled, *call), differentiate(spec.op, *call)
    assert_same(outputs, expected, f"{spec.name} output")
    assert_same(grads.values(), expected_grads.values(), f"{spec.name} gradient")
    without_grad = compiled(**call[0], **sample.options)
    assert_same(as_tuple(without_grad), expected, f"{spec.name} output without gradients")


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w: ops.mlp(x, w, None, w, None, residual=x),
        lambda x, w: ops.rms_norm(x, w[0], residual=x)[0],
    ],
    ids=["mlp", "rms_norm"],
)
def test_compile_of_one_tensor_as_two_arguments(call) -> None:
    torch._dynamo.reset()
    tensors = {"x": torch.randn(16, 16), "w": torch.randn(16, 16)}
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    (outputs, grads), (expected, expected_grads) = (differentiate(f, tensors, {}, ("x",)) for f in (compiled, call))
    assert_same(outputs, expected, "output")
    assert_same(grads.values(), expected_grads.values(), "gradient")


@each_spec
def test_checkpoint(spec: Spec) -> None:
    sample = spec.samples[1]
    call = (sample.tensors(torch.float32), sample.options, sample.wanted)

    def checkpointed(**arguments):
        return checkpoint(lambda: spec.op(**arguments), use_reentrant=False)

    (outputs, grads), (expected, expected_grads) = differentiate(checkpointed, *call), differentiate(spec.op, *call)
    assert_same(outputs, expected, f"{spec.name} output")
    assert_same(grads.values(), expected_grads.values(), f"{spec.name} gradient")


@each_spec
def test_functional_gradient(spec: Spec) -> None:
    sample = spec.samples[1]
    tensors = sample.tensors(torch.float32)
    wanted = {name: tensors.pop(name) for name in sample.wanted}

    def total(arguments):
        return sum(y.sum() for y in as_tuple(spec.op(**arguments, **tensors, **sample.options)))

    leaves = {name: t.clone().requires_grad_() for name, t in wanted.items()}
    expected = torch.autograd.grad(total(leaves), list(leaves.values()))
    made = torch.func.grad(total)(wanted)
    assert_same(made.values(), expected, f"{spec.name} gradient")


@pytest.mark.parametrize(("spec", "sample"), cases(), ids=case_id)
def test_autocast(spec: Spec, sample: Sample) -> None:
    tensors = sample.tensors(torch.float32)
    within = torch.autocast("cpu", torch.bfloat16)
    weights = {name for name, arg in sample.args.items() if arg.weight}

    def cast(**arguments):
        return spec.reference(
            **{
                name: t.bfloat16() if torch.is_tensor(t) and t.is_floating_point() and name not in weights else t
                for name, t in arguments.items()
            }
        )

    if spec.autocast == "output":
        assert_matches(spec, sample, tensors, context=within, eager_context=within)
    else:
        eager = cast if spec.autocast == "cast" else spec.reference
        assert_matches(spec, sample, tensors, context=within, eager=eager)


@each_spec
def test_autocast_to_float16_takes_the_reference(spec: Spec) -> None:
    """On CPU no kernel has it."""
    sample = spec.samples[1]
    with torch.autocast("cpu", torch.float16):
        outputs = forward(spec.op, sample.tensors(torch.float32), sample.options)
    assert all(y.isfinite().all() for y in outputs)


@each_spec
@each_dtype
def test_threads(spec: Spec, dtype: torch.dtype) -> None:
    """Right at any number of threads; the same bits in each run; outputs the same for every number of threads."""
    sample = spec.samples[-1]
    tensors = sample.tensors(dtype)
    call = (spec.op, tensors, sample.options)
    alone = None
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        assert_matches(spec, sample, tensors, what=f"{threads} threads")
        outputs, grads = differentiate(*call, sample.wanted)
        for _ in range(3):
            again, grads_again = differentiate(*call, sample.wanted)
            assert_same(again, outputs, f"{spec.name}, {threads} threads: output")
            assert_same(grads_again.values(), grads.values(), f"{spec.name}, {threads} threads: gradient")
        alone = outputs if alone is None else alone
        assert_same(outputs, alone, f"{spec.name}, {threads} threads against one: output")


@each_dtype
@pytest.mark.parametrize(("spec", "sample"), cases(), ids=case_id)
def test_explain(spec: Spec, sample: Sample, dtype: torch.dtype) -> None:
    bmf.explain(reset=True)
    forward(spec.op, sample.tensors(dtype), sample.options)
    paths = {(call.op, call.path) for call in bmf.explain().calls}
    assert paths == {(spec.name, "native" if sample.covered else "reference")}


@each_spec
def test_explain_names_the_dtype(spec: Spec) -> None:
    bmf.explain(reset=True)
    forward(spec.op, spec.samples[0].tensors(torch.float64), spec.samples[0].options)
    assert {(call.path, call.reason) for call in bmf.explain().calls} == {("reference", "no kernel for torch.float64")}


@each_spec
def test_inputs_are_left_alone(spec: Spec) -> None:
    sample = spec.samples[-1]
    tensors = sample.tensors(torch.float32)
    before = {name: t.clone() for name, t in tensors.items()}
    differentiate(spec.op, tensors, sample.options, sample.wanted)
    assert_same(tensors.values(), before.values(), f"{spec.name} input")


def test_backend_can_be_forced() -> None:
    code = (
        "import torch, bigmodel_fast as bmf; bmf.ops.linear(torch.ones(2, 3), torch.ones(4, 3)); "
        "print(bmf.explain().calls[0])"
    )

    def run(backend: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, "BMF_BACKEND": backend, "PYTHONPATH": os.pathsep.join(sys.path)}
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
        )

    assert "path='reference', reason='BMF_BACKEND=reference'" in run("reference").stdout
    assert "path='native'" in run("native").stdout
    assert "path='reference', reason='BMF_BACKEND=triton'" in run("triton").stdout  # there is none for CPU tensors
    assert "BMF_BACKEND must be one of native, triton, reference, not 'magic'" in run("magic").stderr

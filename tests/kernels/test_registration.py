"""How CUDA tensors find the Triton kernels, as far as fake tensors show it, which only say that they lie on a GPU."""

import importlib
import subprocess
import sys

import pytest
import torch
from compare import as_tuple
from specs import all_specs, case_id
from torch._subclasses.fake_tensor import FakeTensorMode

import bigmodel_fast as bmf
from bigmodel_fast import _dispatch
from bigmodel_fast.ops import _cuda, _dense, _triton

HAVE_TRITON = importlib.util.find_spec("triton") is not None
each_spec = pytest.mark.parametrize("spec", all_specs(), ids=case_id)


def on_a_gpu(spec, dtype: torch.dtype, mode: FakeTensorMode) -> dict[str, torch.Tensor]:
    tensors = spec.samples[1].tensors(dtype)
    with mode:
        return {n: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for n, t in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=case_id)
@each_spec
def test_path_on_a_gpu(spec, dtype: torch.dtype) -> None:
    if spec.name == "attention_varlen":
        pytest.skip("its reference reads lengths, which fake tensors do not have")
    covered = HAVE_TRITON and dtype is not torch.float64 and spec.name in _triton.PUBLIC
    bmf.explain(reset=True)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = on_a_gpu(spec, dtype, mode)
    with mode:
        outputs = as_tuple(spec.op(**tensors, **spec.samples[1].options))
    assert all(t.device.type == "cuda" for t in outputs)
    assert {call.path for call in bmf.explain(reset=True).calls} == {"triton" if covered else "reference"}


@pytest.mark.parametrize(
    ("dtype", "options", "rows", "reason"),
    [
        (torch.bfloat16, {}, 3, ""),
        (torch.float16, {}, 3, ""),
        (torch.float32, {}, 3, "no CUDA C++ kernel for torch.float32"),
        (torch.bfloat16, {"dropout_p": 0.5}, 3, "no CUDA C++ kernel with a residual or dropout"),
        (torch.bfloat16, {"residual": True}, 3, "no CUDA C++ kernel with a residual or dropout"),
        (torch.bfloat16, {}, 0, "a size of 0"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", ["mlp", "gated_mlp"])
def test_what_cuda_cpp_covers(op: str, dtype: torch.dtype, options: dict, rows: int, reason: str, monkeypatch) -> None:
    monkeypatch.setattr(_dispatch, "_native_cuda", {op})
    with FakeTensorMode(), torch.device("cuda"), _dispatch.forcing("native"):
        x, first, up, last = (
            torch.empty(s, dtype=dtype, requires_grad=True) for s in ((rows, 8), (6, 8), (6, 8), (4, 6))
        )
        weights = (first, None, last, None) if op == "mlp" else (first, up, last)
        if "residual" in options:
            options = {"residual": torch.empty(rows, 4, dtype=dtype)}
        bmf.explain(reset=True)
        y = getattr(bmf.ops, op)(x, *weights, **options)
        assert (y.shape, y.dtype, y.requires_grad) == ((rows, 4), dtype, True)
        calls = {(c.op, c.path, c.reason) for c in bmf.explain(reset=True).calls if c.op == op}
    assert calls == {(op, "reference", reason) if reason else (op, "native", _dispatch.UNMEASURED)}


def test_what_cuda_cpp_computes_again_needs_no_triton(monkeypatch) -> None:
    linear, calls = torch.nn.functional.linear, []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: calls.append(a) or linear(*a))
    monkeypatch.setattr(_dispatch, "_native_cuda", {"mlp"})
    with FakeTensorMode(), torch.device("cuda"):
        x, weight, bias = torch.empty(2, 3, 8, dtype=torch.bfloat16), torch.empty(6, 8), torch.empty(6)
        for forced, count in (("native", 1), (None, 1)):
            with _dispatch.forcing(forced):
                z = _dense.before_activation("mlp", x, weight, bias)
            assert (z.shape, z.dtype, len(calls)) == ((6, 6), torch.bfloat16, count)


@pytest.mark.parametrize(("stem", "names"), _triton.LAUNCHERS.items())
def test_every_launcher_is_registered(stem: str, names: tuple[str, ...]) -> None:
    pytest.importorskip("triton")
    assert tuple(importlib.import_module(f"bigmodel_fast.kernels.{stem}").OPERATORS) == names
    for name in names:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bigmodel_fast::{name}", "CUDA")


def test_every_operator_has_a_kernel() -> None:
    assert {spec.name for spec in all_specs()} | {*bmf.optim.__all__} - {"cosine", "warmup_cosine"} == _triton.PUBLIC


def test_triton_is_not_imported_with_the_package() -> None:
    code = "import sys, torch; m = sys.modules; b = 'triton' in m; import bigmodel_fast; print(b, 'triton' in m)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = run.stdout.split()
    assert before == after


def test_wide_heads_take_the_reference_on_a_gpu() -> None:
    pytest.importorskip("triton")
    bmf.explain(reset=True)
    for dtype, dim in ((torch.float32, 136), (torch.bfloat16, 264)):
        with FakeTensorMode():
            q = torch.empty(1, 2, 8, dim, dtype=dtype, device="cuda")
            bmf.ops.attention(q, q, q)
    reasons = {call.reason for call in bmf.explain(reset=True).calls}
    assert reasons == {"no kernel for a head dimension of 136", "no kernel for a head dimension of 264"}


@pytest.mark.parametrize(
    ("dtype", "path", "reason"),
    [(torch.bfloat16, "native", ""), (torch.float16, "native", ""), (torch.float32, "reference", "no CUDA C++ kernel")],
    ids=case_id,
)
def test_the_cuda_kernels_run_where_they_are_forced(dtype: torch.dtype, path: str, reason: str, monkeypatch) -> None:
    """And only there, in a build that has them."""
    pytest.importorskip("triton")
    monkeypatch.setattr(_dispatch, "_native_cuda", {"attention"})
    taken = {}
    with FakeTensorMode():
        q = torch.empty(1, 2, 8, 16, dtype=dtype, device="cuda")
        for backend in (None, "native", "reference"):
            bmf.explain(reset=True)
            with _dispatch.forcing(backend):
                bmf.ops.attention(q, q, q)
            (taken[backend],) = bmf.explain(reset=True).calls
    assert taken[None].path == "triton"
    assert taken["reference"].path == "reference"
    assert taken["native"].path == path
    assert taken["native"].reason.startswith(reason)


def test_the_forced_launch_goes_to_the_cuda_kernel(monkeypatch) -> None:
    monkeypatch.setattr(_dispatch, "_native_cuda", {"attention"})
    monkeypatch.setattr(_cuda, "launch", lambda *arguments: arguments)
    with _dispatch.forcing("native"):
        assert _triton._late("attention", "attention_bwd")(1, 2) == ("attention_bwd", 1, 2)


@pytest.mark.skipif(not _cuda.BUILT, reason="needs a build with BMF_CUDA_ARCHS")
def test_a_build_with_cuda_kernels_registers_them() -> None:
    for name in ("attention_fwd_cuda", "attention_bwd_cuda"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"bigmodel_fast::{name}", "CUDA")
    assert {"attention", "attention_varlen"} <= _dispatch._native_cuda

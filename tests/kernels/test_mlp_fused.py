"""The fused MLP's way to its kernels: parameters laid side by side, gradients, paths.

Plain torch stands for the kernels, whose results tests/cpp/test_mlp_fused_cuda.cpp has.
"""

import copy
import itertools
from collections.abc import Iterator
from types import SimpleNamespace

import numerics
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import bigmodel_fast as bmf
from bigmodel_fast import _dispatch
from bigmodel_fast.models import MLP
from bigmodel_fast.models.mlp import dense_layers
from bigmodel_fast.ops import _mlp_fused
from bigmodel_fast.ops._activation import activate

SIZES = [(10, 64, 64, 5), (7, 64, 64), (3, 128, 128, 128, 2)]


def layers_of(x: Tensor, weights: Tensor, biases: Tensor | None, width: int, outputs: int) -> list[tuple]:
    """(weight, bias) of each layer, out of what lies side by side."""
    hidden = (len(weights) - width * (x.shape[1] + outputs)) // width**2 + 1
    shapes = [(width, x.shape[1]), *[(width, width)] * (hidden - 1), (outputs, width)]
    parts = weights.split([a * b for a, b in shapes])
    offsets = [None] * len(shapes) if biases is None else biases.split([a for a, _ in shapes])
    return [(w.view(shape), b) for w, shape, b in zip(parts, shapes, offsets, strict=True)]


def forward(x: Tensor, weights: Tensor, biases: Tensor | None, width: int, outputs: int, activation: str, save: bool):
    h, pre = x.float(), []
    for w, b in layers_of(x, weights, biases, width, outputs):
        z = h @ w.float().T + (0 if b is None else b)
        pre.append(z)
        h = activate(z, None if activation == "none" else activation)
    saved = torch.stack(pre[:-1]) if save else x.new_empty(0, len(x), width)
    return pre[-1].to(x.dtype), saved.to(x.dtype)


def backward(
    grad_y: Tensor,
    x: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    pre: Tensor,
    width: int,
    activation: str,
    wants_x: bool,
    wants_parameters: bool,
):
    assert activation == "gelu"
    inputs = [x.float(), *(torch.nn.functional.gelu(z) for z in pre.float())]
    g, grads = grad_y.float(), []
    for i, (w, _) in reversed(list(enumerate(layers_of(x, weights, biases, width, grad_y.shape[1])))):
        grads.insert(0, (g.T @ inputs[i], g.sum(0)))
        g = g @ w.float()
        if i > 0:
            g = torch.ops.aten.gelu_backward(g, pre[i - 1].float())
    none = torch.empty(0)
    return (
        g.to(x.dtype) if wants_x else x.new_empty(0, x.shape[1]),
        torch.cat([w.reshape(-1) for w, _ in grads]) if wants_parameters else none,
        torch.cat([b for _, b in grads]) if wants_parameters and biases is not None else none.clone(),
    )


@pytest.fixture
def kernels() -> Iterator[None]:
    library = torch.library.Library("bigmodel_fast", "IMPL")
    library.impl("mlp_fused_fwd", forward, "CPU")
    library.impl("mlp_fused_bwd", backward, "CPU")
    yield
    library._destroy()


def network(sizes: tuple[int, ...], bias: bool | list[bool] = True) -> MLP:
    torch.manual_seed(0)
    return MLP(sizes, activation="gelu", bias=bias)


def run(model: MLP, x: Tensor) -> Tensor:
    layers = dense_layers(model)
    weights, biases = [layer.linear.weight for layer in layers], [layer.linear.bias for layer in layers]
    return _mlp_fused.run(x, weights, biases, layers[0].activation)


@pytest.mark.parametrize("bias", [True, False, "mixed"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_arrive_where_they_belong(sizes: tuple[int, ...], bias, kernels) -> None:
    model = network(sizes, [i % 2 == 0 for i in range(len(sizes) - 1)] if bias == "mixed" else bias).bfloat16()
    x, upstream = torch.randn(9, sizes[0]).bfloat16(), torch.randn(9, sizes[-1]).bfloat16()
    found = {}
    for kind in ("exact", "eager", "ours"):
        m = copy.deepcopy(model).to(torch.float64 if kind == "exact" else torch.bfloat16)
        inputs = x.to(m[0].weight.dtype, copy=True).requires_grad_()
        y = run(m, inputs) if kind == "ours" else m(inputs)
        (y * upstream).sum().backward()
        found[kind] = [y.detach(), inputs.grad, *(p.grad for p in m.parameters())]
    for i, (ours, eager, exact) in enumerate(zip(found["ours"], found["eager"], found["exact"], strict=True)):
        numerics.assert_close(ours, eager, exact, numerics.BACKWARD, f"result {i}")


def test_float32_parameters_have_float32_gradients(kernels) -> None:
    model = network(SIZES[0])
    x = torch.randn(9, 10, dtype=torch.bfloat16)
    run(model, x).float().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
    fine = [p.grad for p in model.parameters() if not torch.equal(p.grad, p.grad.bfloat16().float())]
    assert len(fine) >= 4  # of six; not rounded on their way


def test_only_what_is_wanted_is_computed_and_saved(kernels, monkeypatch) -> None:
    model, x = network(SIZES[0]), torch.randn(9, 10, dtype=torch.bfloat16)
    saved: list = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        run(model, x)
    assert (2, 9, 64) in saved
    with torch.no_grad():
        assert run(model, x).grad_fn is None
    model.requires_grad_(False)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(run(model, leaf).float().sum(), leaf)
    assert grad.abs().sum() > 0


def test_the_operators_are_what_torch_expects(kernels) -> None:
    model, x = network(SIZES[0]).bfloat16(), torch.randn(9, 10, dtype=torch.bfloat16)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.dim() == 2])
    biases = torch.cat([p.detach() for p in model.parameters() if p.dim() == 1]).float()
    checks = "test_faketensor"
    names = torch.ops.bigmodel_fast
    for given in (biases, None):
        torch.library.opcheck(names.mlp_fused_fwd.default, (x, flat, given, 64, 5, "gelu", True), test_utils=checks)
        pre = names.mlp_fused_fwd(x, flat, given, 64, 5, "gelu", True)[1]
        for wants in itertools.product((True, False), repeat=2):
            arguments = (torch.randn(9, 5).bfloat16(), x, flat, given, pre, 64, "gelu", *wants)
            torch.library.opcheck(names.mlp_fused_bwd.default, arguments, test_utils=checks)


def test_it_compiles(kernels) -> None:
    model, x = network(SIZES[0]), torch.randn(9, 10, dtype=torch.bfloat16)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        y = function(model, x)
        y.float().sum().backward()
        results.append([y, *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


FITS = (10, 64, 64, 5)
NOT_ALIKE = "hidden layers that are not all 64 or all 128 wide"


@pytest.mark.parametrize(
    ("sizes", "options", "dtype", "shared", "reason"),
    [
        (FITS, {}, torch.bfloat16, 227, ""),
        ((10, 128, 5), {}, torch.float16, 227, ""),
        ((10, 128, 5), {}, torch.float16, 99, "too little shared memory for layers of 128"),
        (FITS, {}, torch.float32, 227, "no CUDA C++ kernel for torch.float32"),
        ((10, 64, 128, 5), {}, torch.bfloat16, 227, NOT_ALIKE),
        ((10, 96, 5), {}, torch.bfloat16, 227, NOT_ALIKE),
        ((10, 5), {}, torch.bfloat16, 227, NOT_ALIKE),
        ((10, 64, 65), {}, torch.bfloat16, 227, "more outputs than hidden features, or a size of 0"),
        (FITS, {"activation": ["relu", "tanh"]}, torch.bfloat16, 227,
         "layers of different activations, or one behind the last"),
        (FITS, {"dropout": 0.1}, torch.bfloat16, 227, "dropout between layers"),
    ],
)  # fmt: skip
def test_path_on_a_gpu(sizes, options: dict, dtype: torch.dtype, shared: int, reason: str, monkeypatch) -> None:
    properties = SimpleNamespace(shared_memory_per_block_optin=shared << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(_dispatch, "_native_cuda", {"mlp_fused"})
    monkeypatch.setattr(_mlp_fused, "run", lambda x, weights, *_: x.new_empty(len(x), len(weights[-1])))
    with FakeTensorMode(), torch.device("cuda"):
        model, x = MLP(sizes, **options), torch.empty(6, sizes[0], dtype=dtype)
        for layer in dense_layers(model):
            layer.linear.weight, layer.linear.bias = (
                torch.nn.Parameter(p.detach().to(dtype)) for p in layer.linear.parameters()
            )
        path = ("reference", reason) if reason else ("native", _dispatch.UNMEASURED)
        for forced, calls in (("native", {path}), (None, set())):
            bmf.explain(reset=True)
            with _dispatch.forcing(forced):
                assert model(x).shape == (6, sizes[-1])
            found = bmf.explain(reset=True).calls
            assert {(c.path, c.reason) for c in found if c.op == "mlp_fused"} == calls
            assert bool([c for c in found if c.op == "linear"]) == (forced is None or bool(reason))


def test_on_the_cpu_nothing_changes() -> None:
    bmf.explain(reset=True)
    network(SIZES[0])(torch.randn(3, 10))
    assert "mlp_fused" not in {call.op for call in bmf.explain(reset=True).calls}

"""The raw operators of csrc/ops/mlp_cuda.cpp and mlp_fused_cuda.cpp, as they are but for the device they register for:
on CPU tensors, with what they launch on an emulated GPU (tests/cpp/emulated_operators.cpp).
"""

import importlib
import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numerics
import pytest
import torch
from torch import Tensor

from bigmodel_fast.ops import _cuda
from bigmodel_fast.ops._activation import activate

ROOT = Path(__file__).parents[2]
CXX = shutil.which("c++")
STREAM = 0
BF16, FP32 = torch.bfloat16, torch.float32

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CXX is None or not (ROOT / "csrc").is_dir(), reason="needs c++ and the source tree"),
    pytest.mark.skipif(_cuda.BUILT, reason="this build has the operators themselves"),
]


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("operators")
    root = Path(torch.__file__).parent
    sources = [ROOT / "csrc" / "ops" / "common.cpp", *(ROOT / "csrc" / "core" / f"{n}.cpp" for n in ("isa", "scratch"))]
    sources.append(ROOT / "tests" / "cpp" / "emulated_operators.cpp")
    for name in ("mlp_cuda", "mlp_fused_cuda"):
        text = (ROOT / "csrc" / "ops" / f"{name}.cpp").read_text()
        assert "(bigmodel_fast, CUDA, m)" in text
        sources.append(folder / f"{name}.cpp")
        sources[-1].write_text(text.replace("(bigmodel_fast, CUDA, m)", "(bigmodel_fast, CPU, m)"))
    options = ["-std=c++20", "-O1", "-fPIC", "-w", "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{ROOT / 'csrc'}"]
    options += [f"-I{ROOT / 'tests' / 'cpp'}", "-isystem", str(root / "include")]
    objects = [folder / f"{source.stem}.o" for source in sources]
    for source, made in zip(sources, objects, strict=True):
        subprocess.run([str(CXX), *options, "-c", str(source), "-o", str(made)], check=True)
    made = folder / "operators.so"
    link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lpthread"]
    subprocess.run([str(CXX), "-shared", *map(str, objects), "-o", str(made), *link], check=True)
    torch.ops.load_library(str(made))
    for name, module in (("mlp", "mlp"), ("gated_mlp", "gated_mlp"), ("mlp_fused", "_mlp_fused")):
        of = importlib.import_module(f"bigmodel_fast.ops.{module}")
        for direction, fake in (("fwd", of._fake_forward), ("bwd", of._fake_backward)):
            torch.library.register_fake(f"bigmodel_fast::{name}_{direction}_cuda", without_stream(fake))


def without_stream(fake: Callable) -> Callable:
    return lambda *arguments: fake(*arguments[:-1])


def raw(name: str) -> Callable:
    return getattr(torch.ops.bigmodel_fast, f"{name}_cuda").default


def call(name: str, *arguments: object) -> tuple[Tensor, ...]:
    """The operator's results, which are such as its fake kernel says."""
    torch.library.opcheck(raw(name), (*arguments, STREAM), test_utils="test_faketensor")
    return raw(name)(*arguments, STREAM)


def drawn(*shape: int, dtype: torch.dtype = BF16, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).bfloat16().to(dtype)


def compare(
    found: list[Tensor], function: Callable[..., Tensor], tensors: list[Tensor | None], upstream: Tensor
) -> None:
    """Output and gradients of what is not None, beside those of plain torch in bfloat16 and in float64."""
    results = []
    for dtype in (BF16, torch.float64):
        leaves = [t if t is None else t.detach().to(dtype).requires_grad_() for t in tensors]
        y = function(*leaves)
        wanted = [t for t in leaves if t is not None]
        results.append([y.detach(), *torch.autograd.grad(y, wanted, upstream.to(dtype))])
    assert len(found) == len(results[0])
    for i, (ours, eager, exact) in enumerate(zip(found, *results, strict=True)):
        bound = numerics.bound(eager, exact, numerics.BACKWARD)
        assert ours.shape == exact.shape
        assert numerics.max_error(ours, exact) <= bound, i


def reference_of(name: str) -> Callable:
    return importlib.import_module(f"bigmodel_fast.ops.{name}").reference


@pytest.mark.parametrize("weights", [BF16, FP32], ids=str)
@pytest.mark.parametrize(("activation", "hidden"), [("gelu_tanh", 24), ("gelu_tanh", 13), ("relu", 24), ("gelu", 24)])
def test_mlp(activation: str, hidden: int, weights: torch.dtype) -> None:
    torch.manual_seed(0)
    x, dy = drawn(15, 36)[:, ::2].contiguous(), drawn(15, 9)
    w1, w2 = drawn(hidden, 18, dtype=weights, scale=0.3), drawn(9, hidden, dtype=weights, scale=0.3)
    b1, b2 = drawn(hidden, dtype=FP32), drawn(9, dtype=FP32)
    y, pre = call("mlp_fwd", x, w1, b1, w2, b2, activation, True, None, None, 0.0)
    short, none = call("mlp_fwd", x, w1, b1, w2, b2, activation, False, None, None, 0.0)
    assert torch.equal(y, short)
    assert none.shape == (0, hidden)
    full = call("mlp_bwd", dy, x, w1, w2, pre, activation, [True] * 5)
    assert [t.dtype for t in full] == [BF16, weights, FP32, weights, FP32]
    dx, dw1, db1, dw2, db2 = full
    compare(
        [y, dx, dw1, db1, dw2, db2], lambda *t: reference_of("mlp")(*t, activation=activation), [x, w1, b1, w2, b2], dy
    )
    for wants in itertools.product((True, False), repeat=5):
        part = call("mlp_bwd", dy, x, w1, w2, pre, activation, list(wants))
        for want, grad, whole in zip(wants, part, full, strict=True):
            assert torch.equal(grad, whole) if want else grad.shape == (0, *whole.shape[1:])


@pytest.mark.parametrize("weights", [BF16, FP32], ids=str)
def test_gated_mlp(weights: torch.dtype) -> None:
    torch.manual_seed(0)
    x, dy = drawn(15, 36)[:, ::2], drawn(15, 9)  # no contiguous rows
    gate, up, down = (drawn(*s, dtype=weights, scale=0.3) for s in ((13, 18), (13, 18), (9, 13)))
    y, g, u = call("gated_mlp_fwd", x, gate, up, down, "silu", True, None, None, 0.0)
    assert torch.equal(y, call("gated_mlp_fwd", x, gate, up, down, "silu", False, None, None, 0.0)[0])
    full = call("gated_mlp_bwd", dy, x, gate, up, down, g, u, "silu", [True] * 4)
    assert [t.dtype for t in full] == [BF16, weights, weights, weights]
    compare([y, *full], lambda *t: reference_of("gated_mlp")(*t, activation="silu"), [x, gate, up, down], dy)
    for wants in itertools.product((True, False), repeat=4):
        part = call("gated_mlp_bwd", dy, x, gate, up, down, g, u, "silu", list(wants))
        for want, grad, whole in zip(wants, part, full, strict=True):
            assert torch.equal(grad, whole) if want else grad.shape == (0, *whole.shape[1:])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize(("inputs", "width", "outputs"), [(10, 64, 5), (70, 128, 3)])
def test_mlp_fused(inputs: int, width: int, outputs: int, biased: bool) -> None:
    torch.manual_seed(0)
    x, dy = drawn(200, inputs), drawn(200, outputs)
    shapes = [(width, inputs), (width, width), (outputs, width)]
    weights = [drawn(*shape, scale=shape[1] ** -0.5) for shape in shapes]
    biases = [drawn(shape[0], dtype=FP32) if biased else None for shape in shapes]
    flat, offsets = torch.cat([w.reshape(-1) for w in weights]), torch.cat(biases) if biased else None
    y, pre = call("mlp_fused_fwd", x, flat, offsets, width, outputs, "silu", True)
    assert torch.equal(y, call("mlp_fused_fwd", x, flat, offsets, width, outputs, "silu", False)[0])

    def network(x: Tensor, *parameters: Tensor | None) -> Tensor:
        for i in range(3):
            x = torch.nn.functional.linear(x, parameters[i], parameters[3 + i])
            x = activate(x, "silu" if i < 2 else None)
        return x

    dx, dw, db = call("mlp_fused_bwd", dy, x, flat, offsets, pre, width, "silu", True, True)
    parts = [t.view(s) for t, s in zip(dw.split([a * b for a, b in shapes]), shapes, strict=True)]
    parts += db.split([a for a, _ in shapes]) if biased else []
    compare([y, dx, *parts], network, [x, *weights, *biases], dy)
    without = call("mlp_fused_bwd", dy, x, flat, offsets, pre, width, "silu", False, True)
    assert torch.equal(without[1], dw)
    assert torch.equal(call("mlp_fused_bwd", dy, x, flat, offsets, pre, width, "silu", True, False)[0], dx)


def test_what_does_not_fit_is_an_error() -> None:
    x, weights, biases = drawn(9, 10), drawn(64 * 10 + 64 * 64 + 5 * 64), drawn(2 * 64 + 5, dtype=FP32)
    good = {"x": x, "weights": weights, "biases": biases, "width": 64, "outputs": 5}
    for change, words in (
        ({"x": x.float()}, "x must be bfloat16 or float16"),
        ({"weights": weights[1:]}, "weights are of another network"),
        ({"biases": biases[1:]}, "one for each feature of each layer"),
        ({"width": 96}, "64 or 128 wide, got 96"),
        ({"outputs": 65}, "no more outputs than hidden features, got 65"),
    ):
        with pytest.raises(RuntimeError, match=words):
            raw("mlp_fused_fwd")(*(good | change).values(), "relu", False, STREAM)
    w1, w2 = drawn(6, 10), drawn(4, 6)
    with pytest.raises(RuntimeError, match="no residual and no dropout"):
        raw("mlp_fwd")(x, w1, None, w2, None, "relu", False, drawn(9, 4), None, 0.0, STREAM)

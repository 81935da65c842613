"""bmf.accelerate on single layers: the same results, complete undo, and what is left alone."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from accelerated import DTYPES, B, E, H, S, assert_same_model, draw, kinds, outputs_of, seeded
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import bigmodel_fast as bmf


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, E, padding_idx=0)
        self.norm = nn.LayerNorm(E)
        self.rms = nn.RMSNorm(E)
        self.ff = nn.Sequential(nn.Linear(E, 40), nn.GELU(approximate="tanh"), nn.Linear(40, E))
        self.head = nn.Linear(E, 5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.rms(x + self.ff(self.norm(x))))


TOKENS = torch.tensor([[1, 4, 0, 0], [10, 0, 2, 4]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers(dtype: str) -> None:
    bmf.explain(reset=True)
    report, fast = assert_same_model(seeded(Net), outputs_of(TOKENS), dtype)
    assert kinds(report) == {"Embedding", "LayerNorm", "RMSNorm", "Sequential", "Linear"}
    assert not report.left
    assert {c.op for c in bmf.explain().calls if c.path == "native"} == {
        "embedding", "layer_norm", "rms_norm", "mlp", "linear",
    }  # fmt: skip
    assert not fast.embedding.weight.grad[0].any()
    assert "Sequential" in str(report)


def test_restore_is_complete_and_acceleration_idempotent() -> None:
    model = seeded(nn.Transformer, E, H, 1, 1, 32, batch_first=True)
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    first = bmf.accelerate(model)
    classes = [type(m) for m in model.modules()]
    second = bmf.accelerate(model)
    assert [type(m) for m in model.modules()] == classes
    assert {row.why for row in second.accelerated} == {"already accelerated"}
    assert len(first.accelerated) == len(second.accelerated)
    assert bmf.restore(model) is model
    for module, (cls, attributes) in zip(model.modules(), before, strict=True):
        assert type(module) is cls
        assert module.__dict__ == attributes
    assert bmf.restore(model) is model


def test_restore_raises_before_anything_is_undone() -> None:
    model = seeded(Net)
    bmf.accelerate(model)
    model.head.forward = lambda x: x
    with pytest.raises(RuntimeError, match="forward of a Linear was replaced after accelerate"):
        bmf.restore(model)
    assert type(model.norm) is not nn.LayerNorm
    del model.head.forward
    assert type(bmf.restore(model).norm) is nn.LayerNorm


def test_random_numbers_and_buffers_are_left_alone() -> None:
    """Modules are called to find out what they compute."""

    class Counting(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
            self.calls = nn.Buffer(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return nn.functional.dropout(super().forward(x), 0.5, self.training)

    model = Counting()
    before = torch.get_rng_state()
    report = bmf.accelerate(model)
    assert "Counting" not in kinds(report)  # its dropout is no module
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_keep_the_dtype_of_torch_under_autocast(norm: type, dtype: torch.dtype) -> None:
    model, x = norm(E), draw(B, S, E).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        bmf.accelerate(model)
        assert model(x).dtype == expected.dtype


def test_only_this_instance() -> None:
    one, other = seeded(Net), seeded(Net)
    bmf.accelerate(one)
    assert type(other.norm) is nn.LayerNorm
    assert type(one.norm) is not nn.LayerNorm
    assert isinstance(one.norm, nn.LayerNorm)
    assert type(one.norm).__name__ == "LayerNorm"


def test_copies_and_pickles_are_accelerated_and_restorable() -> None:
    model = seeded(Net)
    bmf.accelerate(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    expected = model(TOKENS)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert type(other.norm) is type(model.norm)
        assert torch.equal(other(TOKENS), expected)
        assert type(bmf.restore(other).norm) is nn.LayerNorm


def test_weights_may_be_loaded_afterwards() -> None:
    model, source = seeded(Net), Net()
    bmf.accelerate(model)
    model.load_state_dict(source.state_dict())
    torch.testing.assert_close(model(TOKENS), source(TOKENS), rtol=1e-4, atol=1e-5)


def test_hooks_are_called() -> None:
    """One put on a layer that was fused makes its parent compute as before, and explain() says so."""
    model = seeded(Net)
    bmf.accelerate(model)
    seen: list[str] = []
    model.norm.register_forward_hook(lambda *_: seen.append("norm"))
    model.ff[0].register_forward_hook(lambda *_: seen.append("dense"))
    bmf.explain(reset=True)
    model(TOKENS)
    assert seen == ["norm", "dense"]
    assert ("accelerate: Sequential", "0 has hooks") in {(c.op, c.reason) for c in bmf.explain().calls}


def test_what_is_unusual_is_left_alone() -> None:
    class OwnLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = nn.ModuleDict(
        {
            "subclass": OwnLinear(4, 4),
            "replaced": nn.Linear(4, 4),
            "norm": nn.LayerNorm(4),
            "planes": nn.LayerNorm([4, 4]),
            "sparse": nn.Embedding(4, 4, sparse=True),
            "extra": nn.MultiheadAttention(4, 2, add_zero_attn=True),
        }
    )
    model["replaced"].__dict__["forward"] = lambda x: x
    before = [type(m) for m in model.modules()]
    left = {row.name: row.why for row in bmf.accelerate(model).left}
    assert left == {
        "subclass": "a subclass of Linear with a forward of its own",
        "replaced": "its forward was replaced on this instance",
        "planes": "over several dimensions",
        "sparse": "max_norm, sparse or scale_grad_by_freq",
        "extra": "add_bias_kv or add_zero_attn",
    }
    after = [type(m) for m in model.modules()]
    assert [a is b for a, b in zip(after, before, strict=True)].count(False) == 2  # norm, and extra.out_proj


def test_quantised_and_sharded_weights_are_left_alone() -> None:
    """Weights of another tensor class, by which DTensor and quantised weights come, and of integers."""

    class Packed(Tensor):
        pass

    model = seeded(nn.Sequential, nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.randn(4, 4).as_subclass(Packed))
    model[3].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    left = {row.name: row.why for row in bmf.accelerate(model).left}
    assert left == {"0": "a weight is a Packed", "3": "a weight of torch.int8"}
    assert type(model[0]) is nn.Linear
    assert type(model[2]) is not nn.Linear


def test_weights_that_become_unusual_are_left_to_the_original() -> None:
    class Packed(Tensor):
        pass

    model = seeded(Net)
    bmf.accelerate(model)
    model.ff[0].weight = nn.Parameter(model.ff[0].weight.detach().as_subclass(Packed))
    bmf.explain(reset=True)
    model(TOKENS)
    assert ("accelerate: Sequential", "0 a weight is a Packed") in {(c.op, c.reason) for c in bmf.explain().calls}


def test_parametrized_weights_are_used() -> None:
    model = seeded(Net)
    parametrizations.weight_norm(model.head)
    expected = model(TOKENS)
    bmf.accelerate(model)
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-4, atol=1e-5)


def test_areas_can_be_switched_off() -> None:
    model = seeded(Net)
    report = bmf.accelerate(model, norm=False)
    assert {row.why for row in report.left} == {"norm=False"}
    assert kinds(report, accelerated=False) == {"LayerNorm", "RMSNorm"}
    assert type(model.norm) is nn.LayerNorm


def test_strict_raises_before_anything_is_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm([4, 4]))
    with pytest.raises(
        RuntimeError, match=r"1 modules would be left alone, the first is 1 \(LayerNorm\): over several"
    ):
        bmf.accelerate(model, strict=True)
    assert type(model[0]) is nn.Linear
    with pytest.raises(RuntimeError, match="nothing in the model"):
        bmf.accelerate(nn.Conv2d(1, 1, 1), strict=True)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got a dict"):
        bmf.accelerate({})  # type: ignore[arg-type]


def test_unknown_norms_and_mlps_are_recognised_by_what_they_compute() -> None:
    class StrangeRMSNorm(nn.Module):
        def __init__(self, power: float) -> None:
            super().__init__()
            self.weight, self.eps, self.power = nn.Parameter(torch.rand(E)), 1e-5, power

        def forward(self, x: Tensor) -> Tensor:
            return (1 + self.weight) * x * (x.square().mean(-1, keepdim=True) + self.eps) ** self.power

    class Gate(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(E, 40, False), nn.Linear(40, E, False), nn.Linear(E, 40, False)
            self.drop, self.scale = nn.Dropout(0.0), scale

        def forward(self, x: Tensor) -> Tensor:
            return self.drop(self.b(self.a(x) * nn.functional.silu(self.c(x)))) * self.scale

    right = seeded(nn.Sequential, StrangeRMSNorm(-0.5), Gate(1.0))
    report, _ = assert_same_model(right, outputs_of(draw(B, S, E)), "fp32")
    assert {"StrangeRMSNorm", "Gate"} <= kinds(report)
    wrong = seeded(nn.Sequential, StrangeRMSNorm(-0.51), Gate(2.0))
    report, _ = assert_same_model(wrong, outputs_of(draw(B, S, E)), "fp32")
    assert not {"StrangeRMSNorm", "Gate"} & kinds(report)


def test_is_imported_when_it_is_used() -> None:
    code = "import sys, bigmodel_fast as b; assert 'bigmodel_fast._accelerate' not in sys.modules; b.accelerate; " \
           "assert 'bigmodel_fast._accelerate' in sys.modules; assert 'transformers' not in sys.modules"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True)

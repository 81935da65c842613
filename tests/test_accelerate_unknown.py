"""bmf.accelerate on models nobody has heard of: what is recognised by what it computes, and look-alikes left alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerated import DTYPES, B, E, S, assert_same_model, draw, outputs_of, seeded
from torch import Tensor, nn

import bigmodel_fast as bmf


class MLP(nn.Module):
    """An MLP; its subclasses are none."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(E, 40), nn.Linear(40, E), nn.Dropout(0.0)
        self.act: nn.Module = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.act(self.up(x))))


class QuickGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class QuickMLP(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.act = QuickGELU()


class ActivationFirst(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(self.up(self.act(x))))


class Scaled(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.99


class LearnedScale(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 1))  # which at first changes nothing

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gain


class Residual(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class LearnedActivation(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.PReLU()


class Twice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.act(self.up(x))))


class Noisy(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class DropsItsInput(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(self.drop(x))))


class LayerNorm(nn.Module):
    """A norm with an eps in its forward; its subclasses are none."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(E))
        self.bias = nn.Parameter(torch.zeros(E)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class ByHand(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.var(-1, keepdim=True, correction=0) + 1e-6).sqrt() * self.weight + self.bias


class OtherEps(LayerNorm):
    """By an eps that is not the one it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.eps = 1e-8

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-6)


class Scale(nn.Module):
    """x / rms(x) by weight, under a name that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.tiny = nn.Parameter(torch.ones(E)), 1e-4

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.tiny).rsqrt() * self.weight


class UnbiasedNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.var(-1, keepdim=True) + 1e-5).sqrt() * self.weight + self.bias


class EpsOutsideNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.std(-1, keepdim=True, correction=0) + 1e-5) * self.weight + self.bias


class ResidualNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class TrainingNorm(LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if self.training else 1.0)


class TwoDrops(MLP):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().forward(x))


class SharedDrop(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(super().forward(x))


class DropsByANumber(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.down(self.act(self.up(x))), self.drop.p, self.training)


class DropsTwice(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.drop(self.down(self.act(self.up(x)))))


RECOGNISED = {"mlp": MLP, "quick_gelu": QuickMLP, "norm": LayerNorm, "norm by hand": ByHand, "scale": Scale}
NORM = "its forward does not compute a norm that is known"
OTHER = "two dense layers, but not an MLP that is known"
LOOK_ALIKES = {
    ActivationFirst: OTHER,
    Scaled: OTHER,
    LearnedScale: "gain has parameters",
    Residual: OTHER,
    LearnedActivation: "act has parameters",
    Twice: OTHER,
    Noisy: "drops by other means than its children",
    DropsByANumber: "drops by other means than its children",
    DropsTwice: "a dropout where an MLP has none",
    DropsItsInput: "a dropout where an MLP has none",
    UnbiasedNorm: NORM,
    EpsOutsideNorm: NORM,
    ResidualNorm: NORM,
    TrainingNorm: NORM,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECOGNISED)
def test_what_computes_it_is_replaced(name: str, dtype: str) -> None:
    report, _ = assert_same_model(seeded(RECOGNISED[name]), outputs_of(draw(B, S, E)), dtype)
    assert report.rows[0].accelerated
    assert not report.left


@pytest.mark.parametrize("module", [QuickMLP, MLP, TwoDrops, SharedDrop], ids=lambda m: m.__name__)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_dropouts_are_where_they_were(module: type, bias: bool) -> None:
    """Without a bias nothing is left of an MLP whose hidden layer is dropped, as if its output were."""
    model = seeded(module)
    for dropout in [m for m in model.modules() if isinstance(m, nn.Dropout)]:
        dropout.p = 0.3
    model.down.bias = model.down.bias if bias else None
    fast = copy.deepcopy(model).train()
    assert bmf.accelerate(fast).rows[0].accelerated
    x = draw(1, S, E).expand(3000, S, E)
    with torch.no_grad():
        (m1, s1), (m2, s2) = ((y.mean(0), y.std(0)) for y in (model.train()(x), fast(x)))
    assert ((m1 - m2).abs() <= 5 * s1 * (2 / 3000) ** 0.5).all()
    torch.testing.assert_close(s1, s2, rtol=0.15, atol=0)


@pytest.mark.parametrize("norm", [LayerNorm, ByHand, OtherEps, Scale])
def test_eps_is_the_one_it_computes_with(norm: type) -> None:
    report, _ = assert_same_model(seeded(norm), outputs_of(draw(B, S, E) * 1e-3), "fp32")
    assert report.rows[0].accelerated


def test_a_norm_without_bias_is_replaced() -> None:
    report, _ = assert_same_model(seeded(LayerNorm, False), outputs_of(draw(B, S, E)), "fp32")
    assert [row.kind for row in report.accelerated] == ["LayerNorm"]


@pytest.mark.parametrize("module", LOOK_ALIKES, ids=lambda m: m.__name__)
def test_a_look_alike_is_left_alone(module: type) -> None:
    model = seeded(module).eval()
    x = draw(B, S, E)
    expected = model(x)
    report = bmf.accelerate(model)
    assert (report.left[0].kind, report.left[0].why) == (module.__name__, LOOK_ALIKES[module])
    assert type(model) is module
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [LayerNorm, ByHand, Scale])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_keep_the_dtype_they_had(norm: type, dtype: torch.dtype) -> None:
    model, x = norm(), draw(B, S, E).to(dtype)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        within = model(x)
        assert bmf.accelerate(model).accelerated
        assert model(x).dtype == within.dtype
    assert model(x).dtype == expected.dtype

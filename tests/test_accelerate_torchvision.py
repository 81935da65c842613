"""bmf.accelerate on models of torchvision: Swin Transformers and the Vision Transformer, tiny and random."""

import copy
from functools import partial

import pytest
import torch
from accelerated import DTYPES, as_float64, assert_same_model, assert_same_training, draw, kinds, outputs_of, seeded
from torch import Tensor, nn

import bigmodel_fast as bmf

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed", exc_type=ImportError)
swin = torchvision.models.swin_transformer

CLASSES = torch.tensor([0, 2, 1])


def make(family: str, **changes: float) -> nn.Module:
    """Swin: windows of 4 x 4 over 6 x 6 positions, so padded, every other one shifted; then merged to 3 x 3."""
    if family == "vit":
        shape = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32, "num_classes": 4}
        model = seeded(torchvision.models.VisionTransformer, image_size=24, patch_size=8, **shape, **changes)
    else:
        version = {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
        more = version if family == "swin v2" else {}
        model = seeded(
            partial(swin.SwinTransformer, **{"stochastic_depth_prob": 0.0, **more, **changes}),
            [4, 4], 12, [2, 2], [2, 4], [4, 4], num_classes=4,
        )  # fmt: skip
    for name, p in model.named_parameters():
        if name.endswith(("relative_position_bias_table", "head.weight", "heads.head.weight")):
            nn.init.normal_(p, std=0.5)
    return model


IMAGES = draw(3, 3, 24, 24)
FAMILIES = {
    "swin": {"ShiftedWindowAttention", "MLP", "LayerNorm"},
    "swin v2": {"MLP", "LayerNorm"},
    "vit": {"MultiheadAttention", "MLPBlock", "LayerNorm"},
}


def loss_of(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    logits = model(IMAGES.to(next(model.parameters()).dtype))
    loss = nn.functional.cross_entropy(logits, CLASSES)
    return {"logits": logits, "loss": loss}, loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_loss_and_gradients(family: str, dtype: str) -> None:
    bmf.explain(reset=True)
    report, fast = assert_same_model(make(family).train(), loss_of, dtype)
    assert FAMILIES[family] <= kinds(report)
    assert {row.kind for row in report.left} == ({"ShiftedWindowAttentionV2"} if family == "swin v2" else set())
    assert (family == "swin v2") != (("attention", "native") in {(c.op, c.path) for c in bmf.explain().calls})
    tables = [p for name, p in fast.named_parameters() if "relative_position_bias_table" in name]
    assert all(p.grad.abs().sum() > 0 for p in tables)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_in_eval_mode(family: str) -> None:
    assert_same_model(make(family).eval(), outputs_of(IMAGES), "fp32")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_run(family: str) -> None:
    assert_same_training(make(family).train(), [loss_of])


@pytest.mark.parametrize("family", FAMILIES)
def test_restore(family: str) -> None:
    model = make(family).eval()
    state = [(type(m), dict(m.__dict__)) for m in model.modules()]
    expected = model(IMAGES)
    bmf.accelerate(model)
    assert {row.why for row in bmf.accelerate(model).accelerated} == {"already accelerated"}
    bmf.restore(model)
    assert torch.equal(model(IMAGES), expected)
    for module, (cls, attributes) in zip(model.modules(), state, strict=True):
        assert type(module) is cls
        assert module.__dict__ == attributes


@pytest.mark.parametrize("size", [(4, 4), (8, 8), (5, 11)], ids=str)
def test_windows_of_any_grid(size: tuple[int, int]) -> None:
    """One window, which does not shift; whole windows; and a grid that is padded in both directions."""
    model = seeded(swin.ShiftedWindowAttention, 12, [4, 4], [2, 2], 3)
    x, weights = draw(2, *size, 12), draw(2, *size, 12, 1)[..., 0]

    def call(m: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        y = m(*as_float64(m, x))
        return {"y": y}, (y.double() * weights).sum()

    report, _ = assert_same_model(model, call, "fp32")
    assert report.rows[0].accelerated


def test_dropout_of_windows_drops_as_much_as_the_original() -> None:
    model = seeded(swin.ShiftedWindowAttention, 12, [4, 4], [2, 2], 3, attention_dropout=0.2, dropout=0.3).train()
    fast = copy.deepcopy(model)
    bmf.accelerate(fast)
    x = draw(1, 8, 8, 12).expand(3000, -1, -1, -1)
    with torch.no_grad():
        (m1, s1), (m2, s2) = ((y.mean(0), y.std(0)) for y in (model(x), fast(x)))
    assert ((m1 - m2).abs() / (s1 * (2 / 3000) ** 0.5)).max() < 5
    torch.testing.assert_close(s1, s2, rtol=0.15, atol=0)


def test_a_subclass_with_a_forward_of_its_own_is_left_alone() -> None:
    class ShiftedWindowAttention(swin.ShiftedWindowAttention):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + x

    ShiftedWindowAttention.__module__ = swin.__name__  # as if a later torchvision computed something else
    model = seeded(ShiftedWindowAttention, 12, [4, 4], [2, 2], 3)
    left = {row.kind: row.why for row in bmf.accelerate(model).left}
    assert left == {"ShiftedWindowAttention": "a forward of its own"}


def test_windows_compile_in_one_graph() -> None:
    model = seeded(swin.ShiftedWindowAttention, 12, [4, 4], [2, 2], 3)
    bmf.accelerate(model)
    x = draw(2, 6, 6, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()

"""bmf.accelerate on torch's attention and Transformers: the same results for every kind of mask."""

import copy

import pytest
import torch
from accelerated import DTYPES, B, E, H, S, as_float64, assert_same_model, draw, kinds, outputs_of, seeded, weighed
from torch import Tensor, nn

import bigmodel_fast as bmf

right_padding = torch.arange(S)[None] >= torch.tensor([S, 4])[:, None]
left_padding = right_padding.flip(1)
causal = nn.Transformer.generate_square_subsequent_mask(S)

ATTENTION = {
    "plain": {},
    "right padding": {"key_padding_mask": right_padding},
    "left padding": {"key_padding_mask": left_padding},
    "causal": {"attn_mask": causal},
    "bool mask": {"attn_mask": causal < 0},
    "both": {"attn_mask": causal, "key_padding_mask": right_padding},
    "float padding": {"key_padding_mask": right_padding * -1e9, "attn_mask": causal},
    "mask of each head": {"attn_mask": draw(B * H, S, S)},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", ATTENTION)
def test_multihead_attention(case: str, batch_first: bool) -> None:
    model = seeded(nn.MultiheadAttention, E, H, batch_first=batch_first)
    x = draw(B, S, E) if batch_first else draw(B, S, E).transpose(0, 1)

    def call(m: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        (t,) = as_float64(m, x)
        masks = {k: v.to(t.dtype) if v.is_floating_point() else v for k, v in ATTENTION[case].items()}
        y = m(t, t, t, need_weights=False, **masks)[0]
        return {"y": y}, weighed(y)

    bmf.explain(reset=True)
    report, _ = assert_same_model(model, call, "fp32")
    assert report.accelerated[0].kind == "MultiheadAttention"
    assert {c.path for c in bmf.explain().calls if c.op == "attention"} == {"native"}


def test_cross_attention_of_other_widths() -> None:
    model = seeded(nn.MultiheadAttention, E, H, kdim=16, vdim=20, batch_first=True)
    inputs = draw(B, S, E), draw(B, 5, 16), draw(B, 5, 20)

    def call(m: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        y = m(*as_float64(m, *inputs), need_weights=False)[0]
        return {"y": y}, weighed(y)

    assert_same_model(model, call, "fp32")


def test_weights_asked_for_come_from_the_original() -> None:
    model = seeded(nn.MultiheadAttention, E, H, batch_first=True)
    x = draw(B, S, E)
    expected = model(x, x, x)
    bmf.accelerate(model)
    bmf.explain(reset=True)
    assert all(torch.equal(a, b) for a, b in zip(model(x, x, x), expected, strict=True))
    assert [c.reason for c in bmf.explain().calls] == ["need_weights=True asks for the weights"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"batch_first": False}], ids=str)
def test_transformer(options: dict, dtype: str) -> None:
    """Encoder and decoder, padded and causal.

    In float32 also with the default ReLU, whose kink in bfloat16 turns the last bit of a few rows into a gradient.
    """
    smooth = dtype == "bf16" or "norm_first" in options
    options = {"batch_first": True, "activation": "gelu" if smooth else "relu", **options}
    model = seeded(nn.Transformer, E, H, 2, 2, 32, dropout=0.0, **options)
    src, tgt = draw(B, S, E), draw(B, 5, E)
    if not options["batch_first"]:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    call = outputs_of(
        src, tgt, src_key_padding_mask=right_padding, memory_key_padding_mask=right_padding, tgt_mask=causal[:5, :5]
    )
    bmf.explain(reset=True)
    report, _ = assert_same_model(model, call, dtype)
    assert {"TransformerEncoderLayer", "TransformerDecoderLayer", "MultiheadAttention"} <= kinds(report)
    assert not report.left
    assert not [c for c in bmf.explain().calls if c.op.startswith("accelerate")]


def test_dropout_of_a_layer_drops_as_much_as_the_original() -> None:
    """Means over many draws agree: each of the four dropouts is there, once, and none in eval mode."""
    model = seeded(nn.TransformerEncoderLayer, E, H, 32, dropout=0.5, batch_first=True, norm_first=True).train()
    fast = copy.deepcopy(model)
    bmf.accelerate(fast)
    x = draw(1, S, E).expand(4000, S, E)
    with torch.no_grad():
        (m1, m2), (s1, s2) = zip(*((y.mean(0), y.std(0)) for y in (model(x), fast(x))), strict=True)
        torch.testing.assert_close(fast.eval()(x[:2]), model.eval()(x[:2]), rtol=1e-4, atol=1e-5)
    assert ((m1 - m2).abs() / (s1 * (2 / 4000) ** 0.5)).max() < 5
    torch.testing.assert_close(s1, s2, rtol=0.15, atol=0)


def test_compiles_in_one_graph() -> None:
    model = seeded(nn.TransformerEncoderLayer, E, H, 32, dropout=0.0, batch_first=True)
    bmf.accelerate(model)
    x = draw(B, S, E)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_vision_transformer() -> None:
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    model = seeded(
        torchvision.models.VisionTransformer,
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5,
    )  # fmt: skip
    report, _ = assert_same_model(model, outputs_of(draw(2, 3, 16, 16)), "fp32")
    assert {"MultiheadAttention", "MLPBlock", "LayerNorm"} <= kinds(report)

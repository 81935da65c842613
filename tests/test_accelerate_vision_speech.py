"""bmf.accelerate on models of transformers that see and hear: ViT, CLIP, Whisper, wav2vec2, tiny and random."""

import copy
from typing import Any

import pytest
import torch
from accelerated import DTYPES, as_float64, assert_same_model, assert_same_training, draw, kinds, seeded, weighed
from torch import Tensor, nn

import bigmodel_fast as bmf
from bigmodel_fast._accelerate import projected

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

B, S, VOCABULARY = 3, 6, 31
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(3, VOCABULARY, (B, S), generator=GENERATOR)
PRESENT = (torch.arange(S)[None] < torch.tensor([S, 4, 3])[:, None]).long()
LABELS = TOKENS.masked_fill(PRESENT == 0, -100)
CLASSES = torch.tensor([0, 2, 1])
PIXELS, SOUND, SPECTRUM = draw(B, 3, 16, 16), draw(B, 200), draw(B, 4, 20)
HEARD = (torch.arange(200)[None] < torch.tensor([200, 150, 170])[:, None]).long()

LAYERS = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}
IMAGE = {**LAYERS, "image_size": 16, "patch_size": 8}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = {**LAYERS, "vocab_size": VOCABULARY, "max_position_embeddings": S, "pad_token_id": 0, "eos_token_id": 2}
WHISPER = {
    "vocab_size": VOCABULARY, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_source_positions": 10,
    "max_target_positions": 16, "num_mel_bins": 4, "dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
WAV2VEC2 = {
    **LAYERS, "vocab_size": VOCABULARY, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0,
    "apply_spec_augment": False, "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0, "final_dropout": 0.0, "pad_token_id": 0,
}  # fmt: skip
CLIP_TEXT = {"input_ids": TOKENS, "attention_mask": PRESENT, "pixel_values": PIXELS, "return_loss": True}


def clip(activation: str) -> dict[str, Any]:
    towers = {"text_config": {**TEXT, "hidden_act": activation}, "vision_config": {**IMAGE, "hidden_act": activation}}
    return {**towers, "projection_dim": 16}


# Class of the model, its configuration, what it is called with, its outputs, classes that must be accelerated.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str, set[str]]] = {
    "vit": (
        "ViTForImageClassification",
        {**IMAGE, **QUIET, "num_labels": 4},
        {"pixel_values": PIXELS, "labels": CLASSES},
        "logits",
        {"ViTAttention", "ViTMLP", "LayerNorm"},
    ),
    "clip": ("CLIPModel", clip("quick_gelu"), CLIP_TEXT, "logits_per_image", {"CLIPAttention", "CLIPMLP", "LayerNorm"}),
    "clip, gelu": ("CLIPModel", clip("gelu"), CLIP_TEXT, "logits_per_text", {"CLIPAttention", "CLIPMLP", "LayerNorm"}),
    "whisper": (
        "WhisperForConditionalGeneration",
        WHISPER,
        {"input_features": SPECTRUM, "labels": LABELS},
        "",
        {"WhisperAttention", "WhisperEncoderLayer", "WhisperDecoderLayer", "WhisperForConditionalGeneration"},
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        WAV2VEC2,
        {"input_values": SOUND, "attention_mask": HEARD, "labels": LABELS},
        "logits",
        {"Wav2Vec2Attention", "Wav2Vec2FeedForward", "LayerNorm"},
    ),
    "wav2vec2, norm first": (
        "Wav2Vec2ForSequenceClassification",
        {**WAV2VEC2, "do_stable_layer_norm": True, "feat_extract_norm": "layer", "num_labels": 4},
        {"input_values": SOUND, "labels": CLASSES},
        "logits",
        {"Wav2Vec2Attention", "Wav2Vec2FeedForward", "LayerNorm"},
    ),
}


def make(family: str, **changes: Any) -> nn.Module:
    name, config, *_ = FAMILIES[family]
    cls = getattr(transformers, name)
    model = seeded(lambda: cls(cls.config_class(**{**config, **changes})))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(5)  # what they begin with says little of a model so narrow
    return model


def call(family: str, **changes: Any):
    """The loss of a family's example, or a loss of its outputs where there are no labels."""
    _, _, inputs, output, _ = FAMILIES[family]
    inputs = {name: value for name, value in {**inputs, **changes}.items() if value is not None}
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}

    def run(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        given = dict(zip(tensors, as_float64(model, *tensors.values()), strict=True))
        made = model(**{**inputs, **given})
        outputs = {name: made[name] for name in (output or "logits",) if output or not model.training}
        loss = weighed(next(iter(outputs.values()))) if made.get("loss") is None else made["loss"]
        return outputs if made.get("loss") is None else {**outputs, "loss": loss}, loss

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family: str, dtype: str) -> None:
    bmf.explain(reset=True)
    model = make(family).train()
    if dtype == "bf16" and "logit_scale" in model._parameters:
        model.logit_scale.requires_grad_(False)  # one number, the sum of what cancels: either may be near by chance
    report, _ = assert_same_model(model, call(family), dtype)
    assert FAMILIES[family][-1] <= kinds(report)
    paths = {(c.op, c.path) for c in bmf.explain().calls}
    assert ("attention", "native") in paths
    assert not [op for op, _ in paths if op.startswith("accelerate")]


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_in_eval_mode(family: str) -> None:
    labels = {"labels": None, "return_loss": None}
    if family == "whisper":
        labels["decoder_input_ids"] = TOKENS
    assert_same_model(make(family).eval(), call(family, **labels), "fp32")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_run(family: str) -> None:
    assert_same_training(make(family).train(), [call(family)])


@pytest.mark.parametrize("family", FAMILIES)
def test_restore(family: str) -> None:
    model = make(family).train()
    expected = call(family)(model)[1]
    state = [(type(m), dict(m.__dict__)) for m in model.modules()]
    first = bmf.accelerate(model)
    second = bmf.accelerate(model)
    assert {row.why for row in second.accelerated} == {"already accelerated"}
    assert len(first.accelerated) == len(second.accelerated)
    bmf.restore(model)
    assert torch.equal(call(family)(model)[1], expected)
    for module, (cls, attributes) in zip(model.modules(), state, strict=True):
        assert type(module) is cls
        assert module.__dict__ == attributes


def test_what_is_left_says_why() -> None:
    left = {row.kind: row.why for row in bmf.accelerate(make("vit", hidden_act="mish")).left}
    assert left == {"ViTMLP": "two dense layers, but not an MLP that is known"}
    assert not bmf.accelerate(make("wav2vec2")).left


# ---- Whisper ----


def test_whisper_generates_the_same_text() -> None:
    model = make("whisper").eval()
    fast = copy.deepcopy(model)
    bmf.accelerate(fast)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(fast.generate(SPECTRUM, **options), model.generate(SPECTRUM, **options))


def test_whisper_fills_a_cache_as_before_and_goes_on_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keep, kept = projected.keep, []
    monkeypatch.setattr(projected, "keep", lambda *args: (kept.append(args[3]), keep(*args))[1])
    model = make("whisper").eval()
    fast = copy.deepcopy(model)
    bmf.accelerate(fast)
    kept.clear()  # what was tried
    caches = []
    with torch.no_grad():
        for m in (model, fast):
            states = m.model.encoder(SPECTRUM)
            begun = m(encoder_outputs=states, decoder_input_ids=TOKENS[:, :4], use_cache=True)
            rest = m(encoder_outputs=states, decoder_input_ids=TOKENS[:, 4:], cache=begun.cache)
            caches.append((rest.logits, begun.cache))
    assert kept == [0, 0, 1, 1]  # the first call of each layer's attentions, and no other
    torch.testing.assert_close(caches[1][0], caches[0][0], rtol=1e-4, atol=1e-4)
    assert caches[0][1].is_updated == caches[1][1].is_updated
    for kind in ("self_attention_cache", "cross_attention_cache"):
        for a, b in zip(getattr(caches[0][1], kind).layers, getattr(caches[1][1], kind).layers, strict=True):
            torch.testing.assert_close(b.keys, a.keys, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(b.values, a.values, rtol=1e-4, atol=1e-4)


def test_whisper_refuses_labels_that_are_too_long_as_before() -> None:
    model = make("whisper").train()
    bmf.accelerate(model)
    with pytest.raises(ValueError, match="cannot exceed the maximum allowed length"):
        model(input_features=SPECTRUM, labels=TOKENS.repeat(1, 3))


@pytest.mark.parametrize("what", ["dropout", "activation_dropout", "attention_dropout"])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_layer_of_whisper_drops_as_much_as_the_original(side: str, what: str) -> None:
    model = make("whisper", **{what: 0.4}).train()
    fast = copy.deepcopy(model)
    bmf.accelerate(fast)
    x = draw(1, S, 24).expand(3000, S, 24)
    states = {"encoder_hidden_states": x[:, 1:]} if side == "decoder" else {}
    layers = [getattr(m.model, side).layers[0] for m in (model, fast)]
    with torch.no_grad():
        (m1, s1), (m2, s2) = ((y.mean(0), y.std(0)) for y in (layer(x, None, **states) for layer in layers))
    assert s1.min() > 0.01
    assert ((m1 - m2).abs() <= 5 * s1 * (2 / 3000) ** 0.5).all()
    torch.testing.assert_close(s1, s2, rtol=0.15, atol=0)


# ---- attention that is recognised by what it hands on ----


@pytest.mark.parametrize("family", ["vit", "whisper", "wav2vec2"])
def test_attention_weights_come_from_the_original(family: str) -> None:
    model = make(family).eval()
    inputs = {k: v for k, v in FAMILIES[family][2].items() if k != "labels"}
    inputs |= {"output_attentions": True, **({"decoder_input_ids": TOKENS} if family == "whisper" else {})}
    model.set_attn_implementation("eager")
    expected = model(**inputs)
    bmf.accelerate(model)
    bmf.explain(reset=True)
    found = model(**inputs)
    names = [name for name in expected if "attentions" in name]
    assert names
    for name in names:
        assert len(found[name]) == 2
        for a, b in zip(found[name], expected[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    reasons = {c.reason for c in bmf.explain().calls if c.op == "attention"}
    assert reasons == {"output_attentions=True asks for the weights"}


def test_hooks_within_attention_are_called() -> None:
    model = make("vit").eval()
    bmf.accelerate(model)
    seen: list[str] = []
    model.vit.layers[1].attention.k_proj.register_forward_hook(lambda *_: seen.append("key"))
    bmf.explain(reset=True)
    model(PIXELS)
    assert seen == ["key"]
    assert ("accelerate: ViTAttention", "k_proj has hooks") in {(c.op, c.reason) for c in bmf.explain().calls}


DECOYS = {
    "an extra scale": lambda x, query, key, value: (query * 1.5, key, value),
    "key and value swapped": lambda x, query, key, value: (query, value, key),
    "a residual": lambda x, query, key, value: (query + x.mean(), key, value),
}


@pytest.mark.parametrize("decoy", DECOYS)
def test_a_look_alike_of_attention_is_left_alone(decoy: str) -> None:
    from transformers.models.vit import modeling_vit

    class Other(modeling_vit.ViTAttention):
        def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            heads = (*hidden_states.shape[:-1], self.num_attention_heads, self.head_dim)
            layers = (self.q_proj, self.k_proj, self.v_proj)
            q, k, v = (layer(hidden_states).view(heads).transpose(1, 2) for layer in layers)
            attend = modeling_vit.ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, modeling_vit.eager_attention_forward
            )
            y, weights = attend(self, *DECOYS[decoy](hidden_states, q, k, v), attention_mask, scaling=self.scaling)
            return self.o_proj(y.flatten(2)), weights

    model = make("vit").eval()
    model.vit.layers[0].attention.__class__ = Other
    expected = model(PIXELS).logits
    report = bmf.accelerate(model)
    assert {row.kind: row.why for row in report.left} == {
        "Other": "its forward is not that of an attention that is known"
    }
    assert "ViTAttention" in kinds(report)
    torch.testing.assert_close(model(PIXELS).logits, expected, rtol=1e-4, atol=1e-4)


def test_compiles_in_one_graph() -> None:
    model = make("vit").eval()
    bmf.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(PIXELS).logits, model(PIXELS).logits, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()

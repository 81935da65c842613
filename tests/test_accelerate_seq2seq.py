"""bmf.accelerate on T5 and BART: encoder-decoders with cross attention, tiny and random, against stock and float64."""

import copy
from typing import Any

import pytest
import torch
from accelerated import DTYPES, assert_same_model, assert_same_training, kinds, weighed
from torch import Tensor, nn

import bigmodel_fast as bmf
from bigmodel_fast import ops

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

VOCABULARY, B, S, T = 61, 3, 12, 7  # S tokens are read, T are written
GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randint(3, VOCABULARY, (B, S), generator=GENERATOR)
TARGETS = torch.randint(3, VOCABULARY, (B, T), generator=GENERATOR)
LENGTHS = torch.tensor([S, 7, 4])
RIGHT = (torch.arange(S) < LENGTHS[:, None]).long()
PADDING = {"none": None, "right": RIGHT, "left": RIGHT.flip(1)}
WRITTEN = (torch.arange(T) < torch.tensor([5, T, 3])[:, None]).long()
LABELS = TARGETS.masked_fill(WRITTEN == 0, -100)
EXAMPLE = {"attention_mask": RIGHT, "labels": LABELS}

T5 = {
    "vocab_size": VOCABULARY, "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 10, "dropout_rate": 0.0,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 32,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": None, "scale_embedding": True,
}  # fmt: skip
T5_KINDS = {"T5Attention", "T5LayerSelfAttention", "T5LayerCrossAttention", "T5LayerFF", "T5LayerNorm"}
# Class of the model, its configuration, classes that must be accelerated.
FAMILIES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "t5": ("T5ForConditionalGeneration", T5, {*T5_KINDS, "T5DenseActDense", "T5ForConditionalGeneration"}),
    "t5, gated": (
        "T5ForConditionalGeneration",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        {*T5_KINDS, "T5DenseGatedActDense", "T5ForConditionalGeneration"},
    ),
    "bart": (
        "BartForConditionalGeneration",
        BART,
        {
            "BartAttention",
            "BartEncoderLayer",
            "BartDecoderLayer",
            "BartForConditionalGeneration",
            "LayerNorm",
            "BartScaledWordEmbedding",
        },
    ),
}
LAYER = {
    "t5": "encoder.block.0.layer.1.DenseReluDense",
    "bart": "model.encoder.layers.0.self_attn",
}  # its output ends a block


def make(family: str, **changes: Any) -> nn.Module:
    name, config, _ = FAMILIES[family]
    cls = getattr(transformers, changes.pop("cls", name))
    torch.manual_seed(0)
    config = cls.config_class(**{**config, **changes})
    config._attn_implementation = "eager"
    model = cls(config)
    for p in model.parameters():
        nn.init.normal_(p, 0.0, 0.2) if p.dim() > 1 else nn.init.normal_(p, 0.5, 0.1)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(torch.linspace(-1, 1, VOCABULARY))
    return model


def loss_of(**inputs: Any):
    def call(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        loss = model(TOKENS, **inputs).loss
        assert loss.isfinite()
        return {"loss": loss}, loss

    return call


def explained() -> set[tuple[str, str, str]]:
    return {(c.op, c.path, c.reason) for c in bmf.explain(reset=True).calls}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family: str, dtype: str) -> None:
    """The fused loss, with padding on both sides of the cross attention."""
    bmf.explain(reset=True)
    report, fast = assert_same_model(make(family).train(), loss_of(**EXAMPLE), dtype)
    assert FAMILIES[family][2] <= kinds(report)
    found = explained()
    assert {("attention", "native", ""), ("linear_cross_entropy", "native", "")} <= found
    assert not [op for op, _, _ in found if op.startswith("accelerate")]
    made, stock = fast(TOKENS, **EXAMPLE), make(family).train()(TOKENS, **EXAMPLE)
    assert made.logits is None
    assert (made.past_key_values is None) == (stock.past_key_values is None)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family: str, padding: str) -> None:
    """Outputs and all gradients in eval mode; what padding of the decoder sees is no one's business."""
    mask = PADDING[padding]

    def call(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        out = model(TOKENS, attention_mask=mask, decoder_input_ids=TARGETS, decoder_attention_mask=WRITTEN)
        logits = out.logits[WRITTEN.bool()]
        return {"logits": logits}, weighed(logits)

    assert_same_model(make(family).eval(), call, "fp32")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_run(family: str) -> None:
    calls = [loss_of(attention_mask=RIGHT, labels=LABELS.roll(i, 1)) for i in range(3)]
    assert_same_training(make(family).train(), calls)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_told_of_padding_by_lengths(family: str, monkeypatch) -> None:
    """No mask is added up: T5's encoder and cross attention skip the keys that padding is; BART's has none."""
    calls, attention = [], ops.attention

    def watching(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append((query.shape[2], key.shape[2], options))
        return attention(query, key, value, **options)

    monkeypatch.setattr(ops, "attention", watching)
    model = make(family).train()
    bmf.accelerate(model)
    model(TOKENS, **EXAMPLE)
    encoder = [] if family == "bart" else [(S, S)] * 2
    assert [(q, k) for q, k, _ in calls] == encoder + [(T, T), (T, S)] * 2
    for queries, keys, options in calls:
        causal = queries == keys == T
        assert options.get("is_causal", False) is causal
        bias = options.get("attn_mask")
        if family == "bart" or queries != keys:
            assert bias is None
        else:
            assert tuple(bias.shape) == (1, 4, queries, keys)  # one for the whole batch
        if not causal:
            assert torch.equal(options["key_lengths"], LENGTHS)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache(family: str, beams: int, padding: str) -> None:
    model = make(family).eval()
    fast = copy.deepcopy(model)
    bmf.accelerate(fast)
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "attention_mask": PADDING[padding]}
    assert torch.equal(fast.generate(TOKENS, **options), model.generate(TOKENS, **options))


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_with_a_cache(family: str) -> None:
    """Logits of tokens given one by one are those of all tokens at once, and the stock model's."""
    model = make(family).eval()
    fast = copy.deepcopy(model)
    bmf.accelerate(fast)
    whole = model(TOKENS, attention_mask=RIGHT, decoder_input_ids=TARGETS).logits
    cache = None
    for t in range(T):
        out = fast(
            TOKENS, attention_mask=RIGHT, decoder_input_ids=TARGETS[:, t : t + 1], past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        torch.testing.assert_close(out.logits[:, 0], whole[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_restore(family: str) -> None:
    model = make(family).train()
    state = [(type(m), dict(m.__dict__)) for m in model.modules()]
    expected = model(TOKENS, **EXAMPLE)
    first = bmf.accelerate(model)
    classes = [type(m) for m in model.modules()]
    assert len(bmf.accelerate(model).accelerated) == len(first.accelerated)
    assert [type(m) for m in model.modules()] == classes
    assert model(TOKENS, **EXAMPLE).logits is None
    bmf.restore(model)
    found = model(TOKENS, **EXAMPLE)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    for module, (cls, attributes) in zip(model.modules(), state, strict=True):
        assert type(module) is cls
        assert module.__dict__ == attributes


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_given_beside_labels(family: str) -> None:
    """num_items_in_batch and ignore_index are no business of these models; decoder_input_ids are; logits in eval."""
    model = make(family).train()
    assert_same_model(model, loss_of(**EXAMPLE, num_items_in_batch=50, ignore_index=7), "fp32")
    assert_same_model(model, loss_of(**EXAMPLE, decoder_input_ids=TARGETS.flip(1)), "fp32")
    memory = model.get_encoder()(TOKENS, attention_mask=RIGHT)
    fast = copy.deepcopy(model)
    bmf.accelerate(fast)
    given = {"encoder_outputs": memory, **EXAMPLE}
    torch.testing.assert_close(fast(**given).loss, model(**given).loss, rtol=1e-4, atol=1e-4)
    assert fast.eval()(TOKENS, **EXAMPLE).logits.shape == (B, T, VOCABULARY)
    assert fast.train()(TOKENS, **EXAMPLE, return_dict=False)[1].shape == (B, T, VOCABULARY)


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_weights_come_from_the_original(family: str) -> None:
    model = make(family).eval()
    given = {"attention_mask": RIGHT, "decoder_input_ids": TARGETS, "output_attentions": True}
    expected = model(TOKENS, **given)
    bmf.accelerate(model)
    bmf.explain(reset=True)
    found = model(TOKENS, **given)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    for kind in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert len(found[kind]) == len(expected[kind]) == 2
        for a, b in zip(found[kind], expected[kind], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    reasons = {reason for op, _, reason in explained() if op == "attention"}
    assert reasons == {"output_attentions=True asks for the weights"}
    model(TOKENS, **EXAMPLE)  # transformers leaves its own hooks behind
    assert ("attention", "native", "") in explained()


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_hooks_see_what_they_saw(family: str) -> None:
    """A module whose last product would take in the residual gives its own output to a hook."""
    model = make(family).train()
    expected, found = [], []
    fast = copy.deepcopy(model)
    bmf.accelerate(fast)
    for m, seen in ((model, expected), (fast, found)):
        module = m.get_submodule(LAYER[family])
        module.register_forward_hook(lambda m, i, y, seen=seen: seen.append(y[0] if isinstance(y, tuple) else y))
        m(TOKENS, **EXAMPLE)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    dense = "encoder.block.0.layer.0.SelfAttention.q" if family == "t5" else "model.decoder.layers.0.fc1"
    seen: list[int] = []
    fast.get_submodule(dense).register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(fast(TOKENS, **EXAMPLE).loss, model(TOKENS, **EXAMPLE).loss, rtol=1e-4, atol=1e-4)
    assert seen == [1]
    assert f"{dense.rpartition('.')[2]} has hooks" in {reason for _, _, reason in explained()}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_adapters_on_fused_layers(family: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = {"t5": ["q", "v", "wo"], "bart": ["q_proj", "v_proj", "fc1"]}[family]
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, lora_dropout=0.0)
    model = make(family).train()
    torch.manual_seed(1)
    before = peft.get_peft_model(copy.deepcopy(model), config)
    assert_same_model(before, loss_of(**EXAMPLE), "fp32")
    bmf.accelerate(model)
    torch.manual_seed(1)
    late = peft.get_peft_model(model, config)
    torch.testing.assert_close(late(TOKENS, **EXAMPLE).loss, before(TOKENS, **EXAMPLE).loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_unusual_weights_are_left_alone(family: str) -> None:
    """Those of another class, by which DTensor and quantised weights come: the layers beside are accelerated."""

    class Packed(Tensor):
        pass

    model = make(family).train()
    expected = model(TOKENS, **EXAMPLE).loss
    names = {"t5": ("encoder.block.0.layer.0.SelfAttention.v", "encoder.block.1.layer.1.DenseReluDense.wo"),
             "bart": ("model.encoder.layers.0.self_attn.v_proj", "model.decoder.layers.1.fc2")}[family]  # fmt: skip
    for name in names:
        layer = model.get_submodule(name)
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    left = {row.name: row.why for row in bmf.accelerate(model).left}
    for name in names:
        parent, _, child = name.rpartition(".")
        assert left[name] == "a weight is a Packed"
        assert left[parent] == f"{child} a weight is a Packed"
    torch.testing.assert_close(model(TOKENS, **EXAMPLE).loss.as_subclass(Tensor), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("area", ["attention", "mlp", "norm", "loss"])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_areas_can_be_switched_off(family: str, area: str) -> None:
    report, _ = assert_same_model(make(family).train(), loss_of(**EXAMPLE), "fp32", **{area: False})
    assert f"{area}=False" in {row.why for row in report.left}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_gradient_checkpointing(family: str) -> None:
    model = make(family).train()
    model.gradient_checkpointing_enable()
    assert_same_model(model, loss_of(**EXAMPLE), "fp32")


DROPOUTS = [
    ("t5", {"dropout_rate": 0.2}),
    ("t5, gated", {"dropout_rate": 0.2}),
    ("bart", {"dropout": 0.2}),
    ("bart", {"attention_dropout": 0.3}),
    ("bart", {"activation_dropout": 0.3}),
]


@pytest.mark.parametrize(("family", "dropouts"), DROPOUTS)
def test_dropout_is_at_work_in_training_only(family: str, dropouts: dict[str, float]) -> None:
    """Means and deviations over many rows agree with the stock model's: each dropout is there, and once."""
    model = make(family, **dropouts).train()
    fast = copy.deepcopy(model)
    bmf.accelerate(fast)
    rows = 2000
    given = {"input_ids": TOKENS[:1].expand(rows, S), "decoder_input_ids": TARGETS[:1].expand(rows, T)}
    with torch.no_grad():
        (m1, s1), (m2, s2) = ((y.mean(0), y.std(0)) for y in (m(**given).logits for m in (model, fast)))
        torch.testing.assert_close(
            fast.eval()(TOKENS, decoder_input_ids=TARGETS).logits,
            model.eval()(TOKENS, decoder_input_ids=TARGETS).logits,
            rtol=1e-3, atol=1e-3,
        )  # fmt: skip
    assert s1.min() > 0
    assert ((m1 - m2).abs() / (s1 * (2 / rows) ** 0.5)).max() < 6
    torch.testing.assert_close(s1, s2, rtol=0.2, atol=0)


def test_layers_that_only_look_like_these_are_left_alone() -> None:
    """Names are the same: where the residual comes from, or where dropout stands, is not."""
    layer = type(make("bart").model.encoder.layers[0])

    class Scaled(layer):
        def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
            return 2 * super().forward(hidden_states, attention_mask, **kwargs)

    class Twice(layer):
        def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
            y = super().forward(hidden_states, attention_mask, **kwargs)
            return nn.functional.dropout(y, self.activation_dropout, self.training)

    for other in (Scaled, Twice):
        model = make("bart").eval()
        for changed in model.model.encoder.layers:
            changed.__class__ = other
        expected = model(TOKENS, decoder_input_ids=TARGETS).logits
        report = bmf.accelerate(model)
        assert (other.__name__, "a forward of its own") in {(row.kind, row.why) for row in report.left}
        torch.testing.assert_close(model(TOKENS, decoder_input_ids=TARGETS).logits, expected, rtol=1e-4, atol=1e-4)

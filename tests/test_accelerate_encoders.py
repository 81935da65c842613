"""bmf.accelerate on DistilBERT and ModernBERT, tiny and random, against stock and float64."""

import copy
from typing import Any

import pytest
import torch
from accelerated import assert_same_model, assert_same_training, explained, kinds, loss_of, ops_used, packs, weighed
from torch import Tensor, nn

import bigmodel_fast as bmf
from bigmodel_fast import ops
from bigmodel_fast._accelerate import post_norm
from bigmodel_fast._accelerate.layers import Finish, within
from bigmodel_fast.ops._encoder_layer import encoder_layer

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

VOCABULARY, B, S, CLASSES = 61, 3, 12, 3
LENGTHS = torch.tensor([S, 7, 1])
RIGHT = (torch.arange(S) < LENGTHS[:, None]).long()
PADDING = {"right": RIGHT, "left": RIGHT.flip(1), "full": torch.ones_like(RIGHT), "none": None}
SHAPE = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "num_labels": CLASSES, "pad_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "DistilBert": {
        **SHAPE, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "dropout": 0.0, "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0,
    },
    "ModernBert": {
        **SHAPE, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40,
        "global_attn_every_n_layers": 2, "local_attention": 6, "bos_token_id": 1, "eos_token_id": 2,
        "cls_token_id": 1, "sep_token_id": 2,
    },
}  # fmt: skip
KINDS = {
    "DistilBert": {"DistilBertSelfAttention", "TransformerBlock", "FFN", "LayerNorm", "Embedding"},
    "ModernBert": {"ModernBertAttention", "ModernBertEncoderLayer", "ModernBertMLP", "LayerNorm", "Embedding"},
}
HEADS = ["SequenceClassification", "TokenClassification", "MaskedLM"]
NAMES = [f"{family}For{head}" for family in CONFIGS for head in HEADS]


def draw(high: int, *shape: int) -> Tensor:
    return torch.randint(3, high, shape, generator=torch.Generator().manual_seed(high))


def make(name: str, attention: str = "sdpa", **changes: Any) -> nn.Module:
    """ModernBERT's eager attention takes its softmax in float32, where padding outside of a window makes it NaN."""
    family = name.partition("For")[0].removesuffix("Model")
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    config = cls.config_class(**{**CONFIGS[family], **changes})
    config._attn_implementation = attention
    model = cls(config)
    for p in model.parameters():
        nn.init.normal_(p, 0.0, 0.2) if p.dim() > 1 else nn.init.normal_(p, 0.3, 0.1)
    return model.train()


def inputs(name: str, padding: str = "right") -> dict[str, Tensor]:
    mask = PADDING[padding]
    present = torch.ones_like(RIGHT) if mask is None else mask
    tokens = draw(VOCABULARY, B, S) * present
    given = {"input_ids": tokens} | ({} if mask is None else {"attention_mask": mask})
    if name.endswith("SequenceClassification"):
        given["labels"] = torch.tensor([0, 2, 1])
    elif "For" in name:
        given["labels"] = (draw(CLASSES + 3, B, S) - 3 if "Token" in name else tokens).masked_fill(present == 0, -100)
    return given


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients(name: str, padding: str) -> None:
    bmf.explain(reset=True)
    report, _ = assert_same_model(make(name), loss_of(**inputs(name, padding)), "fp32")
    assert KINDS[name.partition("For")[0]] <= kinds(report)
    used = ops_used()
    assert packs(used) == (padding == "right")
    assert not [op for op in used if op.startswith("accelerate")]


@pytest.mark.parametrize("padding", ["right", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str, padding: str) -> None:
    assert_same_model(make(name), loss_of(**inputs(name, padding)), "bf16")


@pytest.mark.parametrize("activation", ["relu", "quick_gelu", "mish"])
def test_activations(activation: str) -> None:
    """The residual is added, be the MLP one operator, two, or its own forward."""
    for name, option in (("DistilBertForMaskedLM", "activation"), ("ModernBertForMaskedLM", "hidden_activation")):
        assert_same_model(make(name, **{option: activation}), loss_of(**inputs(name)), "fp32")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling(pooling: str) -> None:
    """ModernBERT's classifier reads the first token, or the mean of those that are no padding."""
    name = "ModernBertForSequenceClassification"
    assert_same_model(make(name, classifier_pooling=pooling), loss_of(**inputs(name)), "fp32")


@pytest.mark.parametrize("name", ["DistilBertModel", "ModernBertModel"])
@pytest.mark.parametrize("padding", PADDING)
def test_outputs(name: str, padding: str) -> None:
    """A bare model in eval mode: outputs of tokens that are no padding, and all gradients."""
    given, mask = inputs(name, padding), PADDING[padding]
    present = torch.ones_like(RIGHT) if mask is None else mask

    def call(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        hidden = model(**given).last_hidden_state[present.bool()]
        assert hidden.isfinite().all()
        return {"hidden": hidden}, weighed(hidden)

    for unpad in ("auto", True):
        bmf.explain(reset=True)
        assert_same_model(make(name).eval(), call, "fp32", unpad=unpad)
        assert packs(ops_used()) == (unpad is True and padding == "right")


@pytest.mark.parametrize("name", ["DistilBertForMaskedLM", "ModernBertForMaskedLM"])
def test_a_training_run(name: str) -> None:
    given = inputs(name)
    calls = [loss_of(**{**given, "labels": given["labels"].roll(i, 0).masked_fill(RIGHT == 0, -100)}) for i in range(3)]
    assert_same_training(make(name), calls)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("padding", ["right", "full"])
def test_padding_is_not_computed(family: str, padding: str, monkeypatch) -> None:
    """In DistilBERT's last layer, neither are tokens that the head does not read."""
    rows = []
    mlp = "mlp" if family == "DistilBert" else "gated_mlp"
    original = getattr(ops, mlp)

    def counting(x: Tensor, *args: Any, **options: Any) -> Tensor:
        rows.append(x.shape[:-1].numel())
        return original(x, *args, **options)

    def counting_layer(x: Tensor, *args: Any, **options: Any) -> Any:
        y = encoder_layer(x, *args, **options)
        assert y is not None
        rows.append(y.shape[:-1].numel())
        return y

    monkeypatch.setattr(ops, mlp, counting)
    monkeypatch.setattr(post_norm, "encoder_layer", counting_layer)
    name = f"{family}ForSequenceClassification"
    model = make(name)
    bmf.accelerate(model)
    model(**inputs(name, padding))
    tokens = int(LENGTHS.sum()) if padding == "right" else B * S
    assert rows == ([tokens, B] if family == "DistilBert" else [tokens] * 3)


def test_windows_are_those_of_the_model(monkeypatch) -> None:
    """ModernBERT's local layers: no mask but a window, packed or not."""
    windows: list[Any] = []

    def watch(op: str) -> None:
        original = getattr(ops, op)

        def watching(*args: Any, **options: Any) -> Tensor:
            assert options.get("attn_mask") is None
            windows.append(options.get("window"))
            return original(*args, **options)

        monkeypatch.setattr(ops, op, watching)

    watch("attention")
    watch("attention_varlen")
    name = "ModernBertForSequenceClassification"
    model = make(name)
    bmf.accelerate(model)
    for padding in ("right", "full"):
        windows.clear()
        model(**inputs(name, padding))
        assert windows[1] == 3
        assert windows[::2] == [None, None]


@pytest.mark.parametrize("name", ["DistilBertForSequenceClassification", "ModernBertForTokenClassification"])
@pytest.mark.parametrize("area", ["attention", "mlp", "norm", "rotary", "unpad"])
def test_areas_can_be_switched_off(name: str, area: str) -> None:
    report, _ = assert_same_model(make(name), loss_of(**inputs(name)), "fp32", **{area: False})
    off = f"{area}=False" in {row.why for row in report.left}
    assert off or (area == "rotary" and name.startswith("Distil"))


@pytest.mark.parametrize("name", ["DistilBertForMaskedLM", "ModernBertForMaskedLM"])
def test_restore(name: str) -> None:
    model = make(name)
    state = [(type(m), dict(m.__dict__)) for m in model.modules()]
    expected = model(**inputs(name))
    first = bmf.accelerate(model)
    classes = [type(m) for m in model.modules()]
    assert len(bmf.accelerate(model).accelerated) == len(first.accelerated)
    assert [type(m) for m in model.modules()] == classes
    assert model(**inputs(name)).logits is None
    bmf.restore(model)
    found = model(**inputs(name))
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)
    for module, (cls, attributes) in zip(model.modules(), state, strict=True):
        assert type(module) is cls
        assert module.__dict__ == attributes


def test_what_a_masked_loss_is_divided_by() -> None:
    """num_items_in_batch and ignore_index count for ModernBERT; DistilBERT's loss does not know them."""
    for name in ("DistilBertForMaskedLM", "ModernBertForMaskedLM"):
        given = inputs(name)
        given["labels"] = given["labels"].masked_fill(given["input_ids"] % 3 == 0, -100)
        assert_same_model(make(name), loss_of(**given, num_items_in_batch=5), "fp32")
        given["labels"] = given["labels"].masked_fill(given["labels"] == -100, 7)
        assert_same_model(make(name), loss_of(**given, ignore_index=7), "fp32")


def test_a_loss_of_their_own_stays() -> None:
    name = "ModernBertForMaskedLM"
    assert_same_model(make(name, sparse_prediction=True), loss_of(**inputs(name)), "fp32")
    model = make(name)
    bmf.accelerate(model)
    model.loss_function = lambda logits, labels, **_: logits.mean()
    assert model(**inputs(name)).logits is not None
    assert "a loss function of its own" in {reason for _, reason in explained()}


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_asked_for_of_every_layer_has_its_padding(family: str, option: str) -> None:
    name = f"{family}ForSequenceClassification"
    model = make(name, "eager" if option == "output_attentions" else "sdpa")
    stock = copy.deepcopy(model)(**inputs(name), **{option: True})
    bmf.accelerate(model)
    bmf.explain(reset=True)
    found = model(**inputs(name), **{option: True})
    asked = option.removeprefix("output_")
    assert len(found[asked]) == len(stock[asked])
    for a, b in zip(found[asked], stock[asked], strict=True):
        assert a.shape == b.shape
        if option == "output_hidden_states":  # padding outside of a window sees no key
            a, b = a[RIGHT.bool()], b[RIGHT.bool()]
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert (f"accelerate: {family}Model", f"{option}=True asks for what padding makes") in explained()
    model(**inputs(name))  # transformers leaves its own hooks behind
    assert packs(ops_used())


@pytest.mark.parametrize(("family", "inner", "dense"), [
    ("DistilBert", "distilbert.transformer.layer.1.attention", "out_lin"),
    ("ModernBert", "model.layers.1.mlp", "Wo"),
])  # fmt: skip
def test_hooks_see_what_they_saw(family: str, inner: str, dense: str) -> None:
    """The output of a module to which a layer adds, padded; and a hook on a dense layer is called."""
    name = f"{family}ForSequenceClassification"
    model = make(name)
    fast = copy.deepcopy(model)
    bmf.accelerate(fast)
    expected, found = [], []
    for m, seen in ((model, expected), (fast, found)):
        m.get_submodule(inner).register_forward_hook(
            lambda m, i, y, seen=seen: seen.append(y[0] if isinstance(y, tuple) else y)
        )
        m(**inputs(name))
    assert found[0].shape == expected[0].shape
    here = RIGHT.bool()
    torch.testing.assert_close(found[0][here], expected[0][here], rtol=1e-4, atol=1e-4)
    fast.get_submodule(inner)._forward_hooks.clear()
    seen: list[int] = []
    fast.get_submodule(f"{inner}.{dense}").register_forward_hook(lambda *_: seen.append(1))
    found, expected = fast(**inputs(name)).logits, model(**inputs(name)).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert seen == [1]
    assert f"{dense} has hooks" in {reason for _, reason in explained()}


@pytest.mark.parametrize(("family", "targets"), [("DistilBert", ["q_lin", "lin1"]), ("ModernBert", ["Wqkv", "Wo"])])
def test_adapters_on_fused_layers(family: str, targets: list[str]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    name = f"{family}ForSequenceClassification"
    config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, lora_dropout=0.0)
    bmf.explain(reset=True)
    assert_same_model(peft.get_peft_model(make(name), config), loss_of(**inputs(name)), "fp32")
    assert packs(ops_used())


@pytest.mark.parametrize(("family", "layer"), [
    ("DistilBert", "distilbert.transformer.layer.0.attention.k_lin"), ("ModernBert", "model.layers.1.mlp.Wi"),
])  # fmt: skip
def test_unusual_weights_are_left_alone(family: str, layer: str) -> None:
    class Packed(Tensor):
        pass

    name = f"{family}ForSequenceClassification"
    model = make(name)
    expected = model(**inputs(name)).logits
    module = model.get_submodule(layer)
    module.weight = nn.Parameter(module.weight.detach().as_subclass(Packed))
    parent, _, child = layer.rpartition(".")
    left = {row.name: row.why for row in bmf.accelerate(model).left}
    assert (left[layer], left[parent]) == ("a weight is a Packed", f"{child} a weight is a Packed")
    torch.testing.assert_close(model(**inputs(name)).logits.as_subclass(Tensor), expected, rtol=1e-4, atol=1e-4)


def test_biases_of_a_gated_mlp() -> None:
    name = "ModernBertForSequenceClassification"
    how = {"mlp_bias": True, "attention_bias": True, "norm_bias": True}
    report, _ = assert_same_model(make(name, **how), loss_of(**inputs(name)), "fp32")
    assert "a gated MLP with biases" in {row.why for row in report.left}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_activation_checkpointing(family: str, reentrant: bool) -> None:
    name = f"{family}ForSequenceClassification"
    model = make(name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_model(model, loss_of(**inputs(name)), "fp32")


DROPOUTS = [
    ("DistilBertModel", {"dropout": 0.2}),
    ("DistilBertModel", {"attention_dropout": 0.3}),
    ("ModernBertModel", {"embedding_dropout": 0.2}),
    ("ModernBertModel", {"attention_dropout": 0.3}),
    ("ModernBertModel", {"mlp_dropout": 0.3}),
]


@pytest.mark.parametrize(("name", "dropouts"), DROPOUTS)
def test_dropout_is_at_work_in_training_only(name: str, dropouts: dict[str, float]) -> None:
    """Means and deviations over many rows agree with the stock model's: each dropout is there, and once."""
    model = make(name, **dropouts)
    fast = copy.deepcopy(model)
    bmf.accelerate(fast)
    rows = 2000
    tokens = inputs(name, "full")["input_ids"]
    with torch.no_grad():
        (m1, s1), (m2, s2) = ((y.mean(0), y.std(0)) for y in (m(tokens[:1].expand(rows, S))[0] for m in (model, fast)))
        torch.testing.assert_close(fast.eval()(tokens)[0], model.eval()(tokens)[0], rtol=1e-3, atol=1e-3)
    assert s1.min() > 0
    assert ((m1 - m2).abs() / (s1 * (2 / rows) ** 0.5)).max() < 6
    torch.testing.assert_close(s1, s2, rtol=0.2, atol=0)


def test_dropout_of_a_module_and_of_its_caller() -> None:
    """Both are at work where a module that drops its output is given the dropout and the residual behind it."""
    x, residual = torch.ones(500, 64), torch.full((500, 64), 7.0)

    def product(**how: Any) -> Tensor:
        return ops.linear(x, torch.eye(64), **how)

    y = within(Finish(residual, 0.5), 0.5, product) - residual
    assert set(y.unique().tolist()) == {0.0, 4.0}
    assert abs(y.mean().item() - 1.0) < 0.06

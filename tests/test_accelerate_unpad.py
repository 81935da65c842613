"""bmf.accelerate on encoders of transformers: no work for padding, nor for tokens that a head does not read."""

import copy
from typing import Any

import pytest
import torch
from accelerated import DTYPES, assert_same_model, explained, loss_of, ops_used, packs
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import bigmodel_fast as bmf
from bigmodel_fast import ops
from bigmodel_fast._accelerate import post_norm
from bigmodel_fast.ops._encoder_layer import encoder_layer

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

VOCABULARY, B, S, CLASSES = 61, 3, 12, 3
LENGTHS = torch.tensor([S, 7, 1])
RIGHT = (torch.arange(S) < LENGTHS[:, None]).long()
PADDING = {"right": RIGHT, "left": RIGHT.flip(1), "full": torch.ones_like(RIGHT), "none": None}
CONFIG = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
    "intermediate_size": 40, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "num_labels": CLASSES, "pad_token_id": 0,
}  # fmt: skip
OWN = {"Electra": {"embedding_size": 16}}  # another width, so that it has a layer between embeddings and encoder


def draw(high: int, *shape: int) -> Tensor:
    return torch.randint(2, high, shape, generator=torch.Generator().manual_seed(high))


def make(name: str, **changes: Any) -> nn.Module:
    family = name.partition("For")[0].removesuffix("Model")
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    config = cls.config_class(**{**CONFIG, **OWN.get(family, {}), **changes})
    config._attn_implementation = "eager"
    model = cls(config)
    for p in model.parameters():
        nn.init.normal_(p, 0.0, 0.2) if p.dim() > 1 else nn.init.normal_(p, 0.3, 0.1)
    return model.train()


def inputs(name: str, padding: str = "right") -> dict[str, Tensor]:
    mask = PADDING[padding]
    present = torch.ones_like(RIGHT) if mask is None else mask
    tokens = draw(VOCABULARY, B, S) * present
    given = {"input_ids": tokens, "token_type_ids": draw(4, B, S) % 2}
    if mask is not None:
        given["attention_mask"] = mask
    if name.endswith("SequenceClassification"):
        given["labels"] = torch.tensor([0, 2, 1])
    elif name.endswith("Answering"):
        given |= {"start_positions": torch.tensor([1, 2, 0]), "end_positions": torch.tensor([2, 3, 0])}
    elif "For" in name:
        given["labels"] = (draw(CLASSES, B, S) if "Token" in name else tokens).masked_fill(present == 0, -100)
    return given


HEADS = ["SequenceClassification", "TokenClassification", "MaskedLM"]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", [f"{family}For{head}" for family in ("Bert", "Roberta", "Electra") for head in HEADS])
def test_loss_and_gradients(name: str, padding: str) -> None:
    bmf.explain(reset=True)
    assert_same_model(make(name), loss_of(**inputs(name, padding)), "fp32")
    used = ops_used()
    assert packs(used) == (padding == "right")
    assert not [op for op in used if op.startswith("accelerate")]


@pytest.mark.parametrize("padding", ["right", "full"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_layer_computes_what_is_read(padding: str, dtype: str, monkeypatch) -> None:
    """A classifier reads the first token of each sequence, and padding is never computed."""
    rows, mlp = [], ops.mlp

    def counting(x: Tensor, *args: Any, **options: Any) -> Tensor:
        rows.append(x.shape[:-1].numel())
        return mlp(x, *args, **options)

    def counting_layer(x: Tensor, *args: Any, **options: Any) -> Any:
        y = encoder_layer(x, *args, **options)
        assert y is not None
        rows.append(y.shape[:-1].numel())
        return y

    monkeypatch.setattr(ops, "mlp", counting)
    monkeypatch.setattr(post_norm, "encoder_layer", counting_layer)
    name = "BertForSequenceClassification"
    assert_same_model(make(name, num_hidden_layers=3), loss_of(**inputs(name, padding)), dtype)
    tokens = int(LENGTHS.sum()) if padding == "right" else B * S
    assert rows == [tokens, tokens, B]


WATCHED = ("attention", "attention.self.query", "attention.output.LayerNorm", "intermediate.intermediate_act_fn")


@pytest.mark.parametrize("part", [*WATCHED, "chunks", "no dropout module", "a norm left out"])
def test_a_layer_is_one_function_unless_a_part_is_not_itself(part: str) -> None:
    """Hooks are called; what is computed is the same."""
    model, seen = make("BertForSequenceClassification", num_hidden_layers=3), []
    layer = model.bert.encoder.layer[0]
    if part == "chunks":
        layer.chunk_size_feed_forward = 1
    elif part == "no dropout module":
        layer.output.dropout = nn.Identity()

    def watched(m: nn.Module) -> nn.Module:
        if part in WATCHED:
            m.bert.encoder.layer[0].get_submodule(part).register_forward_hook(lambda *_: seen.append(part))
        return m

    bmf.explain(reset=True)
    assert_same_model(
        watched(model),
        loss_of(**inputs("BertForSequenceClassification", "full")),
        "fp32",
        norm=part != "a norm left out",
    )
    layers = sum(c.count for c in bmf.explain().calls if c.op.startswith("encoder_layer"))
    assert layers == (0 if part == "a norm left out" else 2)
    assert len(seen) == (3 if part in WATCHED else 0)  # of the stock model in two dtypes, and of ours


def test_a_weight_that_is_computed() -> None:
    model, given = make("BertForSequenceClassification").eval(), inputs("BertForSequenceClassification")
    bmf.accelerate(model)
    expected = model(**given).logits
    weight_norm(model.bert.encoder.layer[0].attention.self.query)  # weight = direction * length
    torch.testing.assert_close(model(**given).logits, expected)


def test_dropout_of_attention_is_the_modules() -> None:
    """Only dropout modules put into training, as for Monte Carlo dropout: attention keeps its weights."""
    model = make("BertForSequenceClassification", attention_probs_dropout_prob=0.5).eval()
    given = inputs("BertForSequenceClassification", "full")
    bmf.accelerate(model)
    expected = model(**given).logits
    for m in model.modules():
        if isinstance(m, nn.Dropout):
            m.train(m.p == 0.5)
    assert torch.equal(model(**given).logits, expected)


@pytest.mark.parametrize("kind", ["FNet", "BlipText"])
def test_layers_like_berts_with_another_forward(kind: str) -> None:
    """Their MLP is replaced, and nothing else of them."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 40}
    if kind == "FNet":
        config = transformers.FNetConfig(**shape, hidden_dropout_prob=0.0)
    else:
        config = transformers.BlipTextConfig(
            **shape, num_attention_heads=3, encoder_hidden_size=24, projection_dim=8, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0, is_decoder=False,
        )  # fmt: skip
    model = getattr(transformers, f"{kind}Model")(config).eval()
    tokens = draw(VOCABULARY, B, S)
    expected = model(input_ids=tokens).last_hidden_state
    report = bmf.accelerate(model)
    assert any("activation, dropout and residual in one" in row.why for row in report.accelerated)
    torch.testing.assert_close(model(input_ids=tokens).last_hidden_state, expected)


def test_without_unpadding() -> None:
    name = "BertForSequenceClassification"
    bmf.explain(reset=True)
    report, _ = assert_same_model(make(name), loss_of(**inputs(name)), "fp32", unpad=False)
    assert not packs(ops_used())
    assert {row.kind for row in report.left} == {name, "BertModel", "BertEncoder", "BertAttention"}
    assert {row.why for row in report.left} == {"unpad=False"}
    bmf.accelerate(make(name), unpad=False, strict=True)
    with pytest.raises(ValueError, match="unpad must be True, False or \"auto\", got 'no'"):
        bmf.accelerate(make(name), unpad="no")


def test_heads_that_read_padding_get_it() -> None:
    """The softmax of question answering is over all positions; what reads a bare model is not known."""
    bmf.explain(reset=True)
    name = "BertForQuestionAnswering"
    assert_same_model(make(name, num_labels=2), loss_of(**inputs(name)), "fp32")
    for labels in (inputs("BertForMaskedLM", "full")["labels"], None):  # labels on padding; logits
        model = make("BertForMaskedLM")
        given = inputs("BertForMaskedLM") | ({} if labels is None else {"labels": labels})
        if labels is None:
            del given["labels"]
            stock = copy.deepcopy(model)(**given).logits
            bmf.accelerate(model)
            torch.testing.assert_close(model(**given).logits, stock, rtol=1e-4, atol=1e-4)
        else:
            assert_same_model(model, loss_of(**given), "fp32")
    model = make("BertModel")
    stock = copy.deepcopy(model)(**inputs("BertModel")).last_hidden_state
    bmf.accelerate(model)
    torch.testing.assert_close(model(**inputs("BertModel")).last_hidden_state, stock, rtol=1e-4, atol=1e-4)
    assert not packs(ops_used())


def test_a_bare_model_is_unpadded_where_it_is_asked_for() -> None:
    model = make("BertModel")
    stock = copy.deepcopy(model)(**inputs("BertModel"))
    bmf.accelerate(model, unpad=True)
    bmf.explain(reset=True)
    found = model(**inputs("BertModel"))
    assert packs(ops_used())
    here = RIGHT.bool()
    torch.testing.assert_close(found.last_hidden_state[here], stock.last_hidden_state[here], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.pooler_output, stock.pooler_output, rtol=1e-4, atol=1e-4)
    assert not found.last_hidden_state[~here].any()


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_what_is_asked_for_of_every_layer_has_its_padding(option: str) -> None:
    name = "BertForSequenceClassification"
    model = make(name)
    stock = copy.deepcopy(model)(**inputs(name), **{option: True})
    bmf.accelerate(model)
    bmf.explain(reset=True)
    found = model(**inputs(name), **{option: True})
    for a, b in zip(found[option.removeprefix("output_")], stock[option.removeprefix("output_")], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert ("accelerate: BertModel", f"{option}=True asks for what padding makes") in explained()
    model(**inputs(name))  # transformers leaves its own hooks behind
    assert packs(ops_used())


def test_hooks_see_what_they_saw() -> None:
    name = "BertForSequenceClassification"
    model = make(name)
    bmf.accelerate(model)
    shapes = []
    handle = model.bert.encoder.layer[1].register_forward_hook(lambda m, i, y: shapes.append(tuple(y.shape)))
    bmf.explain(reset=True)
    model(**inputs(name))
    assert shapes == [(B, S, 24)]
    assert ("accelerate: BertModel", "encoder.layer.1 has hooks") in explained()
    handle.remove()
    model(**inputs(name))
    assert packs(ops_used())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    name = "BertForSequenceClassification"
    model = make(name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    bmf.explain(reset=True)
    assert_same_model(model, loss_of(**inputs(name)), "fp32")
    assert packs(ops_used())


def test_adapters() -> None:
    """Where attention's projections carry adapters, they are computed one by one, on packed tokens too."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    name = "BertForSequenceClassification"
    config = peft.LoraConfig(target_modules=["query"], init_lora_weights=False, lora_dropout=0.0)
    model = peft.get_peft_model(make(name), config)
    bmf.explain(reset=True)
    assert_same_model(model, loss_of(**inputs(name)), "fp32")
    assert packs(ops_used())


def test_a_packed_mask_is_refused_by_other_attention() -> None:
    """Were it taken for an ordinary mask, sequences would see each other."""
    from bigmodel_fast._accelerate import packing

    mask = packing.make_mask(RIGHT.bool())
    assert packing.boundaries(mask).tolist() == [0, 12, 19, 20]
    assert torch.equal(packing.pad(torch.ones(1, 20, 1), mask)[..., 0].long(), RIGHT)
    q = torch.zeros(1, 1, 20, 8)
    with pytest.raises(TypeError, match="attn_mask must be a tensor of bool or floating point"):
        ops.attention(q, q, q, attn_mask=mask)
    with pytest.raises(RuntimeError):
        nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask)

"""bmf.accelerate on encoder-decoders of transformers: their encoders do no work for padding."""

import copy
from typing import Any

import pytest
import torch
from accelerated import assert_same_model, explained, kinds, ops_used, packs, weighed
from torch import Tensor, nn

import bigmodel_fast as bmf
from bigmodel_fast import ops

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

VOCABULARY, B, S, T = 61, 3, 12, 7  # S tokens are read, T are written
LENGTHS = torch.tensor([S, 7, 1])
RIGHT = (torch.arange(S) < LENGTHS[:, None]).long()
PADDING = {"right": RIGHT, "left": RIGHT.flip(1), "full": torch.ones_like(RIGHT), "none": None}
WRITTEN = (torch.arange(T) < torch.tensor([5, T, 3])[:, None]).long()

T5 = {
    "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4, "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 10, "dropout_rate": 0.0, "eos_token_id": 1,
}  # fmt: skip
BART = {
    "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 32,
    "dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0, "scale_embedding": True, "eos_token_id": 2,
}  # fmt: skip
# Norms in front or behind, positions learned or not, by their own models and by those of the loss.
MODELS = {
    "T5ForConditionalGeneration": T5, "T5Model": T5, "BartForConditionalGeneration": BART, "BartModel": BART,
    "MBartForConditionalGeneration": BART, "MarianMTModel": BART, "PegasusForConditionalGeneration": BART,
    "BlenderbotForConditionalGeneration": BART, "M2M100ForConditionalGeneration": BART,
}  # fmt: skip
UNPADS = {"T5ForConditionalGeneration": {"T5Stack"}, "BartForConditionalGeneration": {"BartModel", "BartEncoder"}}
PAIR = list(UNPADS)


def draw(high: int, *shape: int) -> Tensor:
    return torch.randint(3, high, shape, generator=torch.Generator().manual_seed(high))


TOKENS, TARGETS = draw(VOCABULARY, B, S) * RIGHT, draw(VOCABULARY - 1, B, T)
LABELS = TARGETS.masked_fill(WRITTEN == 0, -100)


def make(name: str, **changes: Any) -> nn.Module:
    cls = getattr(transformers, name)
    torch.manual_seed(0)
    special = {"vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 0}
    config = cls.config_class(**{**MODELS[name], **special, **changes})
    config._attn_implementation = "eager"
    model = cls(config)
    for p in model.parameters():
        nn.init.normal_(p, 0.0, 0.2) if p.dim() > 1 else nn.init.normal_(p, 0.5, 0.1)
    return model.train()


def call_of(name: str, padding: str = "right"):
    """The loss, or what the decoder makes of the tokens written, and what the encoder makes of those that are there."""
    mask = PADDING[padding]
    given = {"labels": LABELS} if "For" in name or "MT" in name else {"decoder_input_ids": TARGETS}
    given |= {} if mask is None else {"attention_mask": mask}
    here = torch.ones_like(RIGHT) if mask is None else mask

    def call(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        out = model(TOKENS, **given)
        result = out.loss if "labels" in given else weighed(out.last_hidden_state)
        return {"result": result, "memory": out.encoder_last_hidden_state[here.bool()]}, result

    return call


def tokens_computed(monkeypatch) -> list[int]:
    """Rows of each MLP's input from now on, but for those by which layers are looked at."""
    rows, mlp = [], ops.mlp

    def counting(x: Tensor, *args: Any, **options: Any) -> Tensor:
        rows.extend([x.shape[:-1].numel()] if x.dtype is torch.float32 else [])
        return mlp(x, *args, **options)

    monkeypatch.setattr(ops, "mlp", counting)
    return rows


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str, padding: str, monkeypatch) -> None:
    rows = tokens_computed(monkeypatch)
    bmf.explain(reset=True)
    report, fast = assert_same_model(make(name), call_of(name, padding), "fp32")
    assert rows == [int(LENGTHS.sum()) if padding == "right" else B * S] * 2 + [B * T] * 2
    used = ops_used()
    assert packs(used) == (padding == "right" and "T5" not in name)
    assert not [op for op in used if op.startswith("accelerate")]
    assert any(kind.endswith("Encoder") or kind == "T5Stack" for kind in kinds(report))
    if padding == "right":
        out = fast(TOKENS, attention_mask=RIGHT, decoder_input_ids=TARGETS)
        assert not out.encoder_last_hidden_state[RIGHT == 0].any()


@pytest.mark.parametrize("name", PAIR)
def test_in_bfloat16(name: str) -> None:
    assert_same_model(make(name), call_of(name), "bf16")


def test_a_batch_of_one() -> None:
    """Where only the length tells a packed batch from a padded one."""
    for name in PAIR:
        model = make(name)

        def call(m: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
            loss = m(TOKENS[1:2], attention_mask=RIGHT[1:2], labels=LABELS[1:2]).loss
            return {"loss": loss}, loss

        assert_same_model(model, call, "fp32")


@pytest.mark.parametrize("name", PAIR)
def test_the_report_and_the_way_back(name: str) -> None:
    model = make(name)
    expected = model(TOKENS, attention_mask=RIGHT, labels=LABELS)
    before = [(type(m), dict(m.__dict__)) for m in model.modules()]
    report = bmf.accelerate(model)
    how = {row.kind: row.why for row in report.accelerated}
    if name.startswith("T5"):
        assert how["T5Stack"].endswith("; attention alone is padded.")
        assert [row.name for row in report.accelerated if row.kind == "T5Stack"] == ["encoder"]
    else:
        assert how["BartEncoder"].endswith(", and pads at the end.")
        assert how["BartModel"] == "Its encoder makes nothing of padding, which is not read."
    model(TOKENS, attention_mask=RIGHT, labels=LABELS)
    bmf.restore(model)
    found = model(TOKENS, attention_mask=RIGHT, labels=LABELS)
    for one in ("loss", "logits", "encoder_last_hidden_state"):
        assert torch.equal(found[one], expected[one])
    assert [(type(m), dict(m.__dict__)) for m in model.modules()] == before
    report = bmf.accelerate(model, unpad=False)
    assert {row.kind for row in report.left if row.why == "unpad=False"} == UNPADS[name]


@pytest.mark.parametrize("name", PAIR)
def test_an_encoder_called_by_others_keeps_padding(name: str, monkeypatch) -> None:
    """What they read of it is not known; with unpad=True it is 0 there."""
    stock = make(name)
    expected = stock.get_encoder()(TOKENS, attention_mask=RIGHT).last_hidden_state
    here, rows = RIGHT.bool(), tokens_computed(monkeypatch)
    for unpad in ("auto", True):
        model = copy.deepcopy(stock)
        bmf.accelerate(model, unpad=unpad)
        rows.clear()
        found = model.get_encoder()(TOKENS, attention_mask=RIGHT).last_hidden_state
        assert rows == [int(LENGTHS.sum()) if unpad is True else B * S] * 2
        torch.testing.assert_close(found[here], expected[here], rtol=1e-4, atol=1e-4)
        if unpad is True:
            assert not found[~here].any()
        else:
            torch.testing.assert_close(found[~here], expected[~here], rtol=1e-4, atol=1e-4)
        options = {"attention_mask": RIGHT, "max_new_tokens": 6, "do_sample": False}
        assert torch.equal(model.eval().generate(TOKENS, **options), stock.eval().generate(TOKENS, **options))
        stock.train()


@pytest.mark.parametrize("name", PAIR)
def test_what_is_asked_for_of_every_layer_has_its_padding(name: str) -> None:
    model = make(name)
    given = {"attention_mask": RIGHT, "labels": LABELS, "output_attentions": True, "output_hidden_states": True}
    expected = model(TOKENS, **given)
    bmf.accelerate(model, loss=True)
    found = model(TOKENS, **given)
    for kind in ("encoder_attentions", "encoder_hidden_states", "decoder_hidden_states"):
        torch.testing.assert_close(found[kind], expected[kind], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PAIR)
def test_hooks_see_what_they_saw(name: str) -> None:
    model, shapes = make(name), []
    bmf.accelerate(model)
    inner = "encoder.block.1.layer.1" if name.startswith("T5") else "model.encoder.layers.1"
    hook = model.get_submodule(inner).register_forward_hook(lambda m, i, y: shapes.append(tuple(y.shape)))
    bmf.explain(reset=True)
    model(TOKENS, attention_mask=RIGHT, labels=LABELS)
    assert shapes == [(B, S, 24)]
    assert any(reason.endswith(" has hooks") for op, reason in explained() if op.startswith("accelerate"))
    hook.remove()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", PAIR)
def test_activation_checkpointing(name: str, reentrant: bool, monkeypatch) -> None:
    model = make(name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    rows = tokens_computed(monkeypatch)
    assert_same_model(model, call_of(name), "fp32")
    assert set(rows) == {int(LENGTHS.sum()), B * T}


@pytest.mark.parametrize("name", PAIR)
def test_adapters(name: str, monkeypatch) -> None:
    """Where attention's projections carry adapters, its own forward computes on packed tokens, T5's bias too."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    target = "q" if name.startswith("T5") else "q_proj"
    config = peft.LoraConfig(target_modules=[target], init_lora_weights=False, lora_dropout=0.0)
    rows = tokens_computed(monkeypatch)
    assert_same_model(peft.get_peft_model(make(name), config), call_of(name), "fp32")
    assert rows == [int(LENGTHS.sum())] * 2 + [B * T] * 2


def test_t5s_first_layer_of_another_kind_gets_the_padded_batch() -> None:
    """It would make the bias for one long sequence."""

    class Other(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    model = make("T5ForConditionalGeneration")
    model.encoder.block[0].layer[0].dropout = Other()
    bmf.explain(reset=True)
    assert_same_model(model, call_of("T5ForConditionalGeneration"), "fp32")
    assert ("accelerate: T5Stack", "its encoder or attention is not accelerated") in explained()


def test_dropped_layers() -> None:
    """Where every layer of an encoder is dropped, none has packed the batch."""
    name = "BartForConditionalGeneration"
    assert_same_model(make(name, encoder_layerdrop=1.0), call_of(name), "fp32")


@pytest.mark.parametrize("area", ["attention", "mlp", "norm", "loss"])
@pytest.mark.parametrize("name", PAIR)
def test_with_other_areas_switched_off(name: str, area: str) -> None:
    assert_same_model(make(name), call_of(name), "fp32", **{area: False})

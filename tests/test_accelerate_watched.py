"""Accelerated models hand over to their own forwards while all modules are hooked, or a part is compiled on its own."""

import copy

import pytest
import torch
from accelerated import B, E, S, draw, explained, seeded
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

import bigmodel_fast as bmf

ALL = "hooks on all modules"


def called(model: nn.Module, *args, **kwargs) -> tuple[list[str], object]:
    """The names of the modules that hooks on all modules see in a call, and its output."""
    names, seen = {m: name for name, m in model.named_modules()}, []
    handle = register_module_forward_hook(lambda m, x, y: seen.append(names.get(m, type(m).__name__)))
    try:
        return seen, model(*args, **kwargs)
    finally:
        handle.remove()


TRANSFORMERS = ("t5", "bart", "vit", "clip", "whisper", "wav2vec2", "bert", "distilbert", "modernbert", "gpt2", "llama")


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_hooks_on_all_modules_see_what_they_see_of_the_stock_model(family: str) -> None:
    pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
    import test_accelerate_compile as compiled
    import test_accelerate_transformers as others

    if family in ("bert", "gpt2", "llama"):
        stock, given = others.make(family), {"input_ids": others.TOKENS, "attention_mask": others.RIGHT}
        given["labels"] = others.LABELS
    else:
        encoder = {"distilbert": "DistilBertForTokenClassification", "modernbert": "ModernBertForMaskedLM"}
        stock, given = compiled.example(encoder.get(family, family))
    fast = copy.deepcopy(stock)
    bmf.accelerate(fast)
    for training in (True, False):
        (expected, y), (found, z) = (called(m.train(training), **given) for m in (stock, fast))
        assert found == expected
        torch.testing.assert_close(z.loss, y.loss, rtol=1e-4, atol=1e-4)
        assert ALL in {reason for _, reason in explained()}
        fast(**given)
        assert ALL not in {reason for _, reason in explained()}


@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention])
def test_hooks_on_all_modules_and_torchs_own_layers(kind: type[nn.Module]) -> None:
    how = {} if kind is nn.MultiheadAttention else {"dim_feedforward": 40, "dropout": 0.0}
    stock, x = seeded(kind, E, 3, batch_first=True, **how), draw(B, S, E)
    inputs = {nn.TransformerEncoderLayer: (x,), nn.TransformerDecoderLayer: (x, x)}.get(kind, (x, x, x, None, False))
    fast = copy.deepcopy(stock)
    bmf.accelerate(fast)
    (expected, y), (found, z) = called(stock, *inputs), called(fast, *inputs)
    assert found == expected
    torch.testing.assert_close(z, y)
    assert ALL in {reason for _, reason in explained()}
    fast(*inputs)
    assert ALL not in {reason for _, reason in explained()}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.drop, self.down = nn.Linear(E, 40), nn.GELU(), nn.Dropout(0.1), nn.Linear(40, E)

    def forward(self, x):
        return self.down(self.drop(self.act(self.up(x))))


@pytest.mark.parametrize("part", ["up", "act", "drop", "down"])
@pytest.mark.parametrize("how", ["has hooks", "its forward was replaced on this instance", "was compiled on its own"])
def test_a_part_that_is_watched_is_called(part: str, how: str) -> None:
    model, x, seen = seeded(Net).eval(), draw(B, S, E), []
    expected = model(x)
    assert "Net" in {row.kind for row in bmf.accelerate(model).accelerated}
    child = model.get_submodule(part)
    if how == "has hooks":
        child.register_forward_hook(lambda *_: seen.append(part))
    elif how.startswith("its forward"):
        forward = child.forward
        child.forward = lambda x: (seen.append(part), forward(x))[1]
    else:
        child.compile(backend="eager")
    try:
        torch.testing.assert_close(model(x), expected)
    finally:
        torch._dynamo.reset()
    assert ("accelerate: Net", f"{part} {how}") in explained()
    assert seen == ([] if "compiled" in how else [part])


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs):
        return 2 * self.inner(*inputs)


@pytest.mark.parametrize("part", ["intermediate", "output"])
def test_a_part_in_another_module_is_called(part: str) -> None:
    pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")
    import test_accelerate_transformers as others

    stock = others.make("bert").eval()
    fast = copy.deepcopy(stock)
    bmf.accelerate(fast)
    for model in (stock, fast):
        layer = model.bert.encoder.layer[0]
        setattr(layer, part, Around(layer.get_submodule(part)))
    given = {"input_ids": others.TOKENS, "attention_mask": others.RIGHT}
    torch.testing.assert_close(fast(**given).logits[0], stock(**given).logits[0], rtol=1e-4, atol=1e-4)


def test_a_model_whose_modules_are_all_hooked_is_left_alone() -> None:
    """Trying out what modules compute would call the hooks."""
    model = seeded(Net)
    seen: list[nn.Module] = []
    handle = register_module_forward_hook(lambda m, x, y: seen.append(m))
    try:
        report = bmf.accelerate(model)
    finally:
        handle.remove()
    assert [(row.accelerated, row.why.partition(":")[0]) for row in report.rows] == [(False, ALL)]
    assert not seen
    assert bmf.accelerate(model).accelerated

"""What is computed again in backward, by mlp, gated_mlp or whole layers: the same bits, and only inputs are kept."""

import pytest
import torch
from compare import assert_same, differentiate
from specs import Spec, all_specs, case_id

from bigmodel_fast import models

each_spec = pytest.mark.parametrize("spec", [s for s in all_specs() if s.name in ("mlp", "gated_mlp")], ids=case_id)


@each_spec
@pytest.mark.parametrize("dtypes", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)])
def test_same_bits(spec: Spec, dtypes: tuple[torch.dtype, torch.dtype | None]) -> None:
    for sample in spec.samples:
        tensors = sample.tensors(*dtypes)
        outputs, grads = differentiate(spec.op, tensors, sample.options, sample.wanted)
        again, grads_again = differentiate(spec.op, tensors, {**sample.options, "recompute": True}, sample.wanted)
        assert_same((*again, *grads_again.values()), (*outputs, *grads.values()), f"{spec.name} {sample}")


@each_spec
def test_keeps_the_inputs_only(spec: Spec) -> None:
    sample = spec.samples[-1]
    tensors = {name: t.requires_grad_() for name, t in sample.tensors(torch.float32).items()}
    own = {t.data_ptr() for t in tensors.values()}

    def kept_elements(recompute: bool) -> int:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            spec.op(**tensors, **sample.options, recompute=recompute)
        return sum(t.numel() for t in kept if t.data_ptr() not in own)

    assert kept_elements(recompute=True) == 0
    assert kept_elements(recompute=False) > 0


def test_an_mlp_with_relu_keeps_nothing_but_its_hidden_layers() -> None:
    model, x = models.MLP([8, 16, 12, 4]), torch.randn(32, 8)
    own = {t.data_ptr() for t in (x, *model.parameters())}
    kept = {}  # what is kept twice takes memory once
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
        y = model(x)
    assert sum(kept[at] for at in kept.keys() - own) == 32 * (16 + 12)
    found = torch.autograd.grad(y.square().sum(), list(model.parameters()))
    plain = torch.nn.Sequential(*model)
    expected = torch.autograd.grad(plain(x).square().sum(), list(plain.parameters()))
    torch.testing.assert_close(found, expected)


# ---- layers of models ----


def gpt(layout: str):
    model = models.GPT(models.GPTConfig(300, 32, layers=2, heads=2, width=32, layout=layout))
    tokens = torch.randint(300, (2, 33))
    return model, (tokens[:, :-1], tokens[:, 1:]), {}


def bert(padded: bool):
    model = models.BERT(models.BERTConfig(300, 32, layers=2, heads=2, width=32, dropout=0.2))
    tokens, positions = torch.randint(300, (2, 32)), torch.tensor([[3, 5], [1, 8]])
    lengths = torch.tensor([32, 20]) if padded else None
    return model, (tokens, positions, tokens.gather(1, positions)), {"lengths": lengths}


def transformer(norm_first: bool):
    shape = models.TransformerConfig(300, 32, layers=2, heads=2, width=32, norm_first=norm_first, dropout=0.2)
    sides = [[torch.randint(300, (n,)).tolist() for n in lengths] for lengths in ((9, 4), (5, 11))]
    source, target = (models.pack(side) for side in sides)
    return models.Transformer(shape), (*source, *target, torch.randint(300, (16,))), {"label_smoothing": 0.1}


MODELS = {
    "gpt2": lambda: gpt("gpt2"),
    "modern": lambda: gpt("modern"),
    "bert": lambda: bert(False),
    "bert, padded": lambda: bert(True),
    "transformer": lambda: transformer(False),
    "transformer, pre-norm": lambda: transformer(True),
}


def step(name: str, again: bool, dtype: str = "fp32", compiled: bool = False):
    """Loss, gradients and the bytes that forward keeps for backward, of a step with dropout in mid-training."""
    torch.manual_seed(0)
    model, batch, options = MODELS[name]()
    models.recompute_layers(model, again)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    torch.manual_seed(1)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"),
    ):
        loss = call(*batch, **options)
    loss.backward()
    after = torch.rand(1)  # as much was drawn
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), after, *grads], sum(size for address, size in kept.items() if address not in own)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_layers_that_run_again_give_the_same_bits_and_keep_less(name: str, dtype: str) -> None:
    straight, kept = step(name, False, dtype)
    again, kept_again = step(name, True, dtype)
    assert_same(again, straight, name)
    assert kept_again < kept / 2


@pytest.mark.parametrize("name", ["modern", "bert"])
def test_layers_run_again_in_a_compiled_graph(name: str) -> None:
    straight, kept = step(name, False, compiled=True)
    again, kept_again = step(name, True, compiled=True)
    assert_same(again, straight, name)
    assert kept_again < kept / 2

"""models.GPT: equal to plain PyTorch and to Hugging Face's GPT-2, generation with and without a cache, bad input."""

import sys
from pathlib import Path

import pytest
import torch

import bigmodel_fast as bmf
from bigmodel_fast.models import GPT, GPTConfig
from bigmodel_fast.ops._heads import split_heads

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
baseline = pytest.importorskip("baseline_gpt")

CONFIGS = {
    "gpt2": GPTConfig(vocab_size=67, context=24, layers=2, heads=3, width=48),
    "modern": GPTConfig(vocab_size=67, context=24, layers=2, heads=4, kv_heads=2, width=48, layout="modern"),
}


@pytest.fixture(params=CONFIGS)
def model(request) -> GPT:
    torch.manual_seed(0)
    model = GPT(CONFIGS[request.param])
    for p in model.parameters():  # biases and norms too
        p.data.add_(torch.randn_like(p) * 0.05)
    return model


def tokens(batch: int = 3, length: int = 20) -> torch.Tensor:
    return torch.randint(67, (batch, length), generator=torch.Generator().manual_seed(1))


def test_logits_loss_and_gradients_are_those_of_plain_torch(model: GPT) -> None:
    plain = baseline.PlainGPT(model.config)
    plain.load_state_dict(model.state_dict())
    x, target = tokens(), tokens().roll(-1, 1)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-4)
    loss, expected = model(x, target), plain(x, target)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_autocast_is_near_float32(model: GPT) -> None:
    x, target = tokens(), tokens().roll(-1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x, target)
    assert loss.dtype is torch.float32
    assert abs(loss.item() - model(x, target).item()) < 0.02


@pytest.mark.parametrize("name", CONFIGS)
def test_compiles_without_a_break(name: str) -> None:
    model = GPT(CONFIGS[name])
    x, target = tokens(), tokens().roll(-1, 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, target), model(x, target), rtol=1e-5, atol=1e-5)


def test_hugging_face_weights_give_equal_logits_and_come_back() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=67, n_positions=24, n_layer=2, n_head=3, n_embd=48)
    ).eval()
    for p in theirs.parameters():
        p.data.add_(torch.randn_like(p) * 0.05)
    model = GPT(CONFIGS["gpt2"])
    model.load_hf_state_dict(theirs.state_dict())
    torch.testing.assert_close(model(tokens()), theirs(tokens()).logits, rtol=1e-4, atol=1e-4)
    back = model.hf_state_dict()
    for key, value in theirs.state_dict().items():
        assert torch.equal(back[key], value), key


def test_a_state_dict_of_another_model_is_refused(model: GPT) -> None:
    if model.config.layout == "modern":
        with pytest.raises(ValueError, match="only layout gpt2"):
            model.hf_state_dict()
        return
    state = model.hf_state_dict()
    with pytest.raises(ValueError, match="has no"):
        model.load_hf_state_dict({k: v for k, v in state.items() if "h.1.ln_2" not in k})
    state["transformer.wpe.weight"] = torch.zeros(5, 48)
    with pytest.raises(ValueError, match="does not fit"):
        model.load_hf_state_dict(state)


def test_the_cache_changes_nothing(model: GPT) -> None:
    x = tokens()
    cache = model.new_cache(len(x))
    with torch.no_grad():
        parts = torch.cat(
            [model.hidden(x[:, :7], cache), *(model.hidden(x[:, i : i + 1], cache) for i in range(7, 20))], 1
        )
        torch.testing.assert_close(parts, model.hidden(x), rtol=1e-4, atol=1e-5)


def test_greedy_generation_is_the_likeliest_token_each_time(model: GPT) -> None:
    x = tokens(2, 5)
    generated = model.generate(x, 10, temperature=0)
    for i in range(5, 15):
        assert torch.equal(generated[:, i], model(generated[:, :i])[:, -1].argmax(-1))


def test_generation_goes_on_past_the_context(model: GPT) -> None:
    generated = model.generate(tokens(2, 20), 40, seed=0)
    assert generated.shape == (2, 60)
    assert int(generated.max()) < 67


def test_sampling_follows_its_seed_and_its_limits(model: GPT) -> None:
    x = tokens(2, 5)
    assert torch.equal(model.generate(x, 12, seed=3), model.generate(x, 12, seed=3))
    assert not torch.equal(model.generate(x, 12, seed=3), model.generate(x, 12, seed=4))
    greedy = model.generate(x, 12, temperature=0)
    assert torch.equal(model.generate(x, 12, top_k=1, seed=3), greedy)
    assert torch.equal(model.generate(x, 12, top_p=1e-6, seed=3), greedy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "multiple of heads"),
        ({"kv_heads": 1}, "needs layout modern"),
        ({"layers": 0}, "layers must be a positive integer, got 0"),
        ({"layout": "gpt3"}, "gpt2 or modern, got 'gpt3'"),
        ({"layout": "modern", "kv_heads": 2}, "multiple of kv_heads"),
        ({"layout": "modern", "width": 9}, "even head dimension, got 3"),
    ],
)
def test_a_wrong_shape_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{"vocab_size": 67, "context": 24, "layers": 2, "heads": 3, "width": 48, **change})


def test_wrong_input_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="25 tokens are more than the context of 24"):
        model(tokens(1, 25))
    for wrong in ({"temperature": -1}, {"top_k": 0}, {"top_p": 0.0}, {"temperature": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model.generate(tokens(1, 3), 1, **wrong)


def test_gradient_of_the_projection_is_not_copied() -> None:
    """Attention's three gradients are one tensor, which split_heads' backward hands on; others are put together."""
    qkv = torch.randn(2, 5, 8, 16, requires_grad=True)
    q, k, v = split_heads(qkv, [4, 2, 2])
    made = []
    for t in (q, k, v):
        t.register_hook(made.append)
    bmf.ops.attention(q, k, v, is_causal=True, enable_gqa=True).sum().backward()
    assert qkv.grad is not None
    assert {g.untyped_storage().data_ptr() for g in made} == {qkv.grad.untyped_storage().data_ptr()}
    assert torch.equal(qkv.grad, torch.cat([g.transpose(1, 2) for g in made], dim=2))
    (apart,) = torch.autograd.grad(sum((t * i).sum() for i, t in enumerate(split_heads(qkv, [4, 2, 2]))), qkv)
    assert torch.equal(apart, torch.tensor([0.0] * 4 + [1.0] * 2 + [2.0] * 2)[:, None].expand_as(qkv))

"""models.BERT: equal to Hugging Face's BertForMaskedLM, padded and not; masked positions only; bad input."""

import pytest
import torch

from bigmodel_fast.models import BERT, BERTConfig

SHAPE = {"vocab_size": 67, "context": 24, "layers": 2, "heads": 3, "width": 48}


@pytest.fixture
def model() -> BERT:
    torch.manual_seed(0)
    model = BERT(BERTConfig(**SHAPE)).eval()
    for p in model.parameters():  # biases and norms too
        p.data.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.fixture
def theirs(model: BERT):
    transformers = pytest.importorskip("transformers")
    found = transformers.BertForMaskedLM(transformers.BertConfig(**model.hf_config())).eval()
    found.load_state_dict(model.hf_state_dict())
    return found


def draw(most: int, *shape: int) -> torch.Tensor:
    return torch.randint(most, shape, generator=torch.Generator().manual_seed(len(shape)))


def test_logits_loss_and_gradients_are_hugging_faces(model: BERT, theirs) -> None:
    tokens, segments = draw(67, 3, 20), draw(2, 3, 20)
    positions = torch.tensor([[0, 5, 19], [3, 4, 5], [18, 1, 2]])
    targets = draw(67, 3, 3)
    targets[1, 1] = -100
    labels = torch.full_like(tokens, -100).scatter(1, positions, targets)
    expected = theirs(tokens, token_type_ids=segments, labels=labels)
    torch.testing.assert_close(model(tokens, segments=segments), expected.logits, rtol=1e-4, atol=1e-4)
    logits = model(tokens, positions, segments=segments)
    torch.testing.assert_close(
        logits, expected.logits.gather(1, positions[..., None].expand(-1, -1, 67)), rtol=1e-4, atol=1e-4
    )
    loss = model(tokens, positions, targets, segments=segments)
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(tokens, targets=labels, segments=segments), loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    for name, parts in model._hf_names():
        gradient = torch.cat([theirs.get_parameter(part).grad for part in parts])
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_padding_changes_nothing_and_is_not_computed(model: BERT, theirs) -> None:
    tokens, lengths = draw(67, 3, 20), torch.tensor([20, 7, 1])
    there = torch.arange(20) < lengths[:, None]
    found = model(tokens, lengths=lengths)
    expected = theirs(tokens, attention_mask=there.long()).logits
    torch.testing.assert_close(found[there], expected[there], rtol=1e-4, atol=1e-4)
    seen = []
    model.layers[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape))
    hidden = model.hidden(tokens, lengths=lengths)
    assert seen == [(28, 48)]
    assert not hidden[~there].any()
    tokens[~there] = 5
    assert torch.equal(model.hidden(tokens, lengths=lengths), hidden)


def test_weights_come_back_and_others_are_refused(model: BERT, theirs) -> None:
    state = theirs.state_dict()
    back = BERT(model.config)
    back.load_hf_state_dict(state)
    for (name, p), q in zip(model.named_parameters(), back.parameters(), strict=True):
        assert torch.equal(p, q), name
    with pytest.raises(ValueError, match=r"has no bert\.encoder\.layer\.1\.output\.dense\.weight"):
        back.load_hf_state_dict({k: v for k, v in state.items() if "layer.1.output.dense" not in k})
    state["bert.embeddings.position_embeddings.weight"] = torch.zeros(5, 48)
    with pytest.raises(ValueError, match="does not fit"):
        back.load_hf_state_dict(state)


def test_training_drops_and_evaluation_does_not(model: BERT) -> None:
    tokens = draw(67, 3, 20)
    assert torch.equal(model.hidden(tokens), model.hidden(tokens))
    model.train()
    assert not torch.allclose(model.hidden(tokens), model.hidden(tokens))


def test_compiles_without_a_break(model: BERT) -> None:
    tokens, positions, targets = draw(67, 3, 20), draw(20, 3, 4), draw(67, 3, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = model(tokens, positions, targets)
    torch.testing.assert_close(compiled(tokens, positions, targets), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "multiple of heads, got 48 and 5"),
        ({"layers": 0}, "layers must be a positive integer, got 0"),
        ({"dropout": 1.0}, "dropout must lie in"),
    ],
)
def test_a_wrong_shape_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BERTConfig(**{**SHAPE, **change})


def test_too_many_tokens_are_refused(model: BERT) -> None:
    with pytest.raises(ValueError, match="25 tokens are more than the context of 24"):
        model(draw(67, 1, 25))

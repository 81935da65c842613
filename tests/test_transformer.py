"""models.Transformer: equal to torch.nn.Transformer, packed; translation by greedy and beam search."""

import itertools

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from bigmodel_fast.models import Transformer, TransformerConfig, pack, translate

SHAPE = {"vocab_size": 37, "context": 24, "layers": 2, "heads": 3, "width": 48, "mlp_width": 80}
END = 0


def make(**changes) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**{**SHAPE, **changes})).eval()
    for p in model.parameters():  # biases and norms too
        p.data.add_(torch.randn_like(p) * 0.05)
    return model


def sequences(*lengths: int, vocab: int = 37) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(1, vocab, (n,), generator=generator).tolist() for n in lengths]


SOURCES, TARGETS = sequences(7, 1, 20, 12), sequences(9, 4, 1, 24)


@pytest.mark.parametrize("norm_first", [False, True])
def test_outputs_loss_and_gradients_are_those_of_nn_transformer(norm_first: bool) -> None:
    model = make(norm_first=norm_first)
    plain = torch.nn.Transformer(
        48, 3, 2, 2, 80, dropout=0.0, batch_first=True, norm_first=norm_first, layer_norm_eps=1e-5
    )
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k != "embedding.weight"})
    embedding = model.embedding.weight.detach().clone().requires_grad_()

    def embed(padded: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(padded, embedding) * 48**0.5 + model.table[: padded.shape[1]]

    source, target = (pad_sequence([torch.tensor(s) for s in side], batch_first=True) for side in (SOURCES, TARGETS))
    absent, there = source == 0, target != 0
    x = plain(
        embed(source),
        embed(target),
        tgt_mask=torch.ones(target.shape[1], target.shape[1]).triu(1).bool(),
        src_key_padding_mask=absent,
        memory_key_padding_mask=absent,
        tgt_key_padding_mask=~there,
    )
    logits = (x @ embedding.t())[there]
    packed = (*pack(SOURCES), *pack(TARGETS))
    torch.testing.assert_close(model(*packed), logits, rtol=1e-4, atol=1e-4)
    labels = torch.randint(37, (len(logits),), generator=torch.Generator().manual_seed(3))
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    loss = model(*packed, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(model.embedding.weight.grad, embedding.grad, rtol=1e-3, atol=1e-5)
    for name, p in plain.named_parameters():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, p.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_no_token_sees_another_pair_or_what_comes_later() -> None:
    model = make()
    together = model(*pack(SOURCES), *pack(TARGETS)).split([len(t) for t in TARGETS])
    for source, target, found in zip(SOURCES, TARGETS, together, strict=True):
        torch.testing.assert_close(found, model(*pack([source]), *pack([target])), rtol=1e-4, atol=1e-4)
        half = target[: len(target) // 2 + 1]
        torch.testing.assert_close(found[: len(half)], model(*pack([source]), *pack([half])), rtol=1e-4, atol=1e-4)


def test_dropout_is_of_training_only() -> None:
    model, packed = make(), (*pack(SOURCES), *pack(TARGETS))
    assert torch.equal(model(*packed), model(*packed))
    model.train()
    assert not torch.allclose(model(*packed), model(*packed))


# ---- translation ----


def decisive() -> Transformer:
    """A model that says different things about different sentences."""
    model = make()
    for p in model.decoder.parameters():
        p.data.add_(torch.randn_like(p) * 0.3)
    return model


def scores(model: Transformer, source: list[int], longest: int, alpha: float) -> dict[tuple[int, ...], float]:
    """Every translation of at most `longest` tokens, the end counted, with its score; without any cache."""
    vocab = model.config.vocab_size
    others = [t for t in range(vocab) if t != END]
    texts = [text for n in range(longest + 1) for text in itertools.product(others, repeat=n)]
    found = {}
    for text in texts:
        closed = [*text, END][:longest]
        log_p = model(*pack([source]), *pack([[END, *closed[:-1]]])).log_softmax(-1)
        total = float(log_p[range(len(closed)), closed].sum())
        found[text] = total / ((5 + len(closed)) / 6) ** alpha
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.6, 3.0])
@torch.no_grad()
def test_a_beam_of_everything_finds_the_best_there_is(alpha: float) -> None:
    model = make(vocab_size=4)
    model.embedding.weight.data.mul_(2)  # probabilities further from even
    for source in sequences(3, 5, 2, vocab=4):
        every = scores(model, source, 4, alpha)
        best = max(every, key=every.__getitem__)
        (found,) = translate(model, *pack([source]), end=END, beams=4**4, length_penalty=alpha, max_new_tokens=4)
        assert tuple(found.tokens) == best
        assert found.score == pytest.approx(every[best], rel=1e-4)


@torch.no_grad()
def greedy(model: Transformer, source: list[int], longest: int) -> list[int]:
    text: list[int] = []
    while len(text) < longest:
        token = int(model(*pack([source]), *pack([[END, *text]]))[-1].argmax())
        if token == END:
            break
        text.append(token)
    return text


def test_one_beam_is_greedy_search() -> None:
    model = decisive()
    found = translate(model, *pack(SOURCES), end=END, beams=1, max_new_tokens=12)
    assert len({tuple(t.tokens) for t in found}) > 1
    assert [t.tokens for t in found] == [greedy(model, source, 12) for source in SOURCES]


def test_more_beams_find_better_ones_and_each_sentence_its_own() -> None:
    model = decisive()
    options = {"end": END, "length_penalty": 1.0, "max_new_tokens": 8}
    greedy_ones, together = (translate(model, *pack(SOURCES), beams=beams, **options) for beams in (1, 5))
    alone = [translate(model, *pack([source]), beams=5, **options)[0] for source in SOURCES]
    assert [t.tokens for t in together] == [t.tokens for t in alone]
    better = [found.score - one.score for found, one in zip(together, greedy_ones, strict=True)]
    assert min(better) > -1e-4
    assert max(better) > 0.01


def test_a_translation_has_an_end() -> None:
    model = decisive()
    for limit, longest in ((None, 24), (3, 3)):
        for found in translate(model, *pack(SOURCES), end=END, beams=2, max_new_tokens=limit):
            assert len(found.tokens) <= longest
            assert END not in found.tokens
    assert translate(model, *pack([]), end=END) == []


@pytest.mark.parametrize("wrong", [{"beams": 0}, {"length_penalty": -1.0}, {"max_new_tokens": 0}])
def test_wrong_options_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        translate(make(), *pack(SOURCES), end=END, **wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 5}, "multiple of heads, got 48 and 5"),
        ({"width": 45, "heads": 3}, "width must be even for sinusoidal positions, got 45"),
        ({"layers": 0}, "layers must be a positive integer, got 0"),
        ({"dropout": -0.1}, "dropout must lie in"),
    ],
)
def test_a_wrong_shape_is_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**{**SHAPE, **change})


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="25 tokens are more than the context of 24"):
        make()(*pack(sequences(3)), *pack(sequences(25)))

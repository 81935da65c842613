"""Masked tokens: how many, which, and what stands in their place."""

import numpy as np
import pytest
import torch

from bigmodel_fast.data import Batches, MaskedBatches, Masking, Tokenizer

WINDOW = 40


def corpus(tokenizer: Tokenizer, words: int = 5000) -> np.ndarray:
    draw = np.random.default_rng(0)
    text = " ".join("abcdefghij"[:n] for n in draw.integers(1, 9, words))
    tokens = np.array(tokenizer.encode(text))
    tokens[::97] = tokenizer.end
    return tokens


def batches(share: float = 0.25, whole_words: bool = False, batch: int = 4, seed: int = 3) -> MaskedBatches:
    tokenizer = Tokenizer()
    masking = Masking(tokenizer, WINDOW, share, whole_words, seed)
    return MaskedBatches(Batches(corpus(tokenizer), batch, WINDOW, seed=seed), masking)


def unmasked(tokens: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The sequences as they were before."""
    tokens = tokens.clone()
    for row, position, target in zip(tokens, positions, targets, strict=True):
        row[position[target != -100]] = target[target != -100]
    return tokens


@pytest.mark.parametrize("whole_words", [False, True])
def test_what_is_masked_is_what_stood_there(whole_words: bool) -> None:
    masked, plain = batches(whole_words=whole_words), Batches(corpus(Tokenizer()), 4, WINDOW, seed=3)
    for _ in range(200):
        tokens, positions, targets = masked.next()
        windows = plain.next()[0]
        assert torch.equal(unmasked(tokens, positions, targets), torch.nn.functional.pad(windows, (1, 0), value=256))
        assert positions.shape == targets.shape == (4, 10)
        used = targets != -100
        assert used.float().mean() > 0.85
        assert not (targets == 256).any()  # the end of a document is never to be predicted
        for position, there in zip(positions, used, strict=True):
            assert len(set(position[there].tolist())) == there.sum()
    assert masked.windows.epoch > 0


def test_most_become_the_mask_some_another_token_some_stay() -> None:
    masked = batches(batch=64)
    kinds = np.zeros(3)
    for _ in range(40):
        tokens, positions, targets = masked.next()
        there = tokens.gather(1, positions)
        kinds += [(there == 257).sum(), ((there != 257) & (there != targets)).sum(), (there == targets).sum()]
    share = kinds / kinds.sum()
    error = 4 * np.sqrt(0.8 * 0.2 / kinds.sum())  # four standard deviations
    assert share == pytest.approx([0.8, 0.1, 0.1], abs=error)


def test_places_are_drawn_evenly() -> None:
    masked = batches(batch=64)
    counts = sum(torch.bincount(masked.next()[1].flatten(), minlength=WINDOW + 1) for _ in range(40))
    assert counts[0] == 0  # the token that begins each sequence
    rest = counts[1:].double() / counts.sum()
    assert (rest * WINDOW - 1).abs().max() < 0.2


def test_words_are_masked_as_a_whole() -> None:
    tokenizer, masked = Tokenizer(), batches(whole_words=True)
    for _ in range(100):
        tokens, positions, targets = masked.next()
        for row, position, target in zip(unmasked(tokens, positions, targets), positions, targets, strict=True):
            chosen = np.zeros(len(row), bool)
            chosen[position[target != -100]] = True
            text = "".join(tokenizer.decode([t]) if t != 256 else "\n" for t in row.tolist())
            assert len(text) == len(row)
            begin = 0
            for i in range(1, len(text) + 1):
                if i == len(text) or not (text[i].isalnum() and text[i - 1].isalnum()):
                    assert chosen[begin:i].all() or not chosen[begin:i].any(), text[begin:i]
                    begin = i


def test_masks_follow_the_place_in_the_data_and_the_seed() -> None:
    masked, again = batches(), batches(seed=9)
    for _ in range(7):
        masked.next()
    again.load_state_dict(masked.state_dict())
    again.masking.seed = 3
    first = masked.next()
    assert all(map(torch.equal, first, again.next()))
    smaller = batches(batch=2)  # cut into other passes
    for _ in range(14):
        smaller.next()
    halves = [smaller.next(), smaller.next()]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(first, zip(*halves, strict=True), strict=True))
    places = [first[1]]
    epoch = masked.windows.epoch
    while masked.windows.epoch == epoch:  # the same windows get other masks in the next epoch
        places.append(masked.next()[1])
    assert not any(torch.equal(places[-1], p) for p in places[:-1])
    assert all(map(torch.equal, batches().spread(2)[1], batches().spread(2)[1]))


def test_where_little_can_be_masked_the_rest_has_no_target() -> None:
    masking = Masking(Tokenizer(), 8, 0.5, False, 0)
    tokens, _, targets = masking.sequence(np.array([256] * 6 + [65, 66]), (0, 0))
    assert sorted(targets.tolist()) == [-100, -100, 65, 66]
    assert (tokens[:7] == 256).all()

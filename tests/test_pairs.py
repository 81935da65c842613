"""Files of pairs, and batches of them."""

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from bigmodel_fast.data import DataError, PairBatches, Pairs, find_pairs, prepare_pairs, read_lines

ENGLISH = [f"{'a ' * (i % 7)}man number {i}" for i in range(40)]
GERMAN = [f"ein Mann{' und noch einer' * (i % 3)}: {i}" for i in range(40)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, lines in (("train.en", ENGLISH), ("train.de", GERMAN), ("dev.en", ENGLISH[:6]), ("dev.de", GERMAN[:6])):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    (tmp_path / "train.de").unlink()
    (tmp_path / "train.de.gz").write_bytes(gzip.compress(("\n".join(GERMAN) + "\n").encode()))
    return tmp_path


def texts(files, batch) -> list[tuple[str, str]]:
    source, source_starts, target, target_starts, labels, _ = batch
    end, decode = files.tokenizer.end, files.tokenizer.decode
    pairs = []
    for i in range(len(source_starts) - 1):
        s = source[source_starts[i] : source_starts[i + 1]].tolist()
        t = target[target_starts[i] : target_starts[i + 1]].tolist()
        l = labels[target_starts[i] : target_starts[i + 1]].tolist()  # noqa: E741
        assert s[-1] == l[-1] == t[0] == end
        assert t[1:] == l[:-1]
        pairs.append((decode(s), decode(l)))
    return pairs


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_pairs_stay_together_plain_or_gzipped(kind: str, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    calls: list[int] = []
    options = {"languages": "en-de", "tokenizer": kind, "vocab_size": 300, "progress": lambda d, t: calls.append(d)}
    files = prepare_pairs(folder, tmp_path / "kept", **options)
    assert (len(files.train), len(files.validation)) == (40, 6)
    batches = PairBatches(files.train, files.tokenizer.end, 8, context=100)
    seen = [pair for _ in range(5) for pair in texts(files, batches.next())]
    assert sorted(seen) == sorted(zip(ENGLISH, GERMAN, strict=True))
    spread = PairBatches(files.validation, files.tokenizer.end, 4, context=100).spread(100)
    assert [p for batch in spread for p in texts(files, batch)] == [
        (e.strip(), g) for e, g in zip(ENGLISH[:6], GERMAN, strict=False)
    ]
    assert calls
    calls.clear()
    prepare_pairs(folder, tmp_path / "kept", **options)
    assert not calls
    other = prepare_pairs(folder, tmp_path / "kept", **{**options, "languages": "de-en"})
    assert other.tokenizer.decode(other.train.source[: other.train.source_starts[1]].tolist()) == GERMAN[0]


def test_empty_lines_are_left_out_with_their_partner(folder: Path, tmp_path: Path) -> None:
    (folder / "train.en").write_text("\n".join(["", "  ", *ENGLISH[2:]]) + "\n")
    files = prepare_pairs(folder, tmp_path / "kept", languages="en-de", tokenizer="bytes")
    assert len(files.train) == 38
    assert files.tokenizer.decode(files.train.target[: files.train.target_starts[1]].tolist()) == GERMAN[2]


@pytest.mark.parametrize(
    ("languages", "message"),
    [
        (None, r"seq2seq\.languages must say from what to what, such as de-en; none was given"),
        ("en", r"seq2seq\.languages must say .* got en"),
        ("en-fr", r"no train\.en beside \.fr \(or \.gz\); files of training are there in de, en"),
    ],
)
def test_languages_that_are_not_there_are_named(languages: str | None, message: str, folder: Path) -> None:
    with pytest.raises(DataError, match=message):
        find_pairs(folder, languages)


def test_files_that_do_not_fit_together_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such folder"):
        find_pairs(folder / "nowhere", "en-de")
    (folder / "dev.de").write_text("eins\n")
    with pytest.raises(DataError, match=r"dev\.en and dev\.de must have as many lines, got 6 and 1"):
        prepare_pairs(folder, tmp_path / "kept", languages="en-de")
    (folder / "dev.de").unlink()
    with pytest.raises(DataError, match=r"no val\.en or valid\.en"):
        find_pairs(folder, "en-de")
    (folder / "train.de.gz").write_text("not gzip")
    with pytest.raises(DataError, match=r"train\.de\.gz: cannot be read"):
        read_lines(folder / "train.de.gz")


def some_pairs(count: int = 50) -> Pairs:
    """Pair i has source tokens of value i + 1, and target tokens likewise, of random lengths."""
    draw = np.random.default_rng(0)
    sides = []
    for _ in range(2):
        lengths = draw.integers(1, 12, count)
        sides += [np.repeat(np.arange(count) + 1, lengths), np.cumsum([0, *lengths])]
    return Pairs(*sides)


def test_the_position_can_be_saved_and_taken_up() -> None:
    batches, again = (PairBatches(some_pairs(), 0, 3, 4, context=12, seed=seed) for seed in (5, 6))
    for _ in range(4 * 5):  # more than an epoch
        batches.next()
    assert batches.epoch == 1
    again.load_state_dict(batches.state_dict())
    for _ in range(10):
        assert all(map(torch.equal, batches.next(), again.next()))


def test_passes_of_a_step_share_its_labels_and_have_like_lengths() -> None:
    whole, cut = PairBatches(some_pairs(), 0, 12, context=12), PairBatches(some_pairs(), 0, 3, 4, context=12)
    for _ in range(9):
        one, parts = whole.next(), [cut.next() for _ in range(4)]
        assert torch.equal(one[4].sort().values, torch.cat([p[4] for p in parts]).sort().values)
        assert one[5] == 1
        for p in parts:
            assert p[5].item() == pytest.approx(len(p[4]) / len(one[4]))
        lengths = [(p[0].numel() + p[4].numel()) for p in parts]
        assert lengths == sorted(lengths)


def test_an_epoch_takes_each_usable_pair_once() -> None:
    pairs = some_pairs()
    batches = PairBatches(pairs, 0, 1, context=6)
    fits = {i + 1 for i in range(50) if max(pairs.source_lengths[i], pairs.target_lengths[i]) <= 6}
    assert 0 < len(fits) < 40
    assert sorted(int(batches.next()[0][0]) for _ in range(len(fits))) == sorted(fits)
    assert batches.epoch == 0
    with pytest.raises(DataError, match=rf"are {len(fits)} pairs of at most 6 tokens for training, less than a step"):
        PairBatches(pairs, 0, 25, 2, context=6)

"""Corpora, tokenizers, token files and the loader."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bigmodel_fast.data import Batches, DataError, Tokenizer, find_documents, prepare

pytest.importorskip("tokenizers")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    for i in range(40):
        (folder / ("deep" if i % 2 else "") / f"{i}.txt").write_text(
            f"document {i}: " + "all work and no play " * (i + 5)
        )
    (folder / "copy.txt").write_text((folder / "deep" / "1.txt").read_text())
    (folder / "empty.txt").write_text("")
    (folder / "picture.bin").write_bytes(bytes(range(256)))
    (folder / "latin1.txt").write_bytes("déjà vu".encode("latin-1"))
    (folder / ".hidden").write_text("secret")
    return folder


def test_a_folder_gives_its_text_files_in_a_fixed_order(corpus: Path) -> None:
    found = find_documents(corpus)
    assert len(found) == 41
    assert found == find_documents(corpus) == sorted(found)
    assert not {"empty.txt", "picture.bin", ".hidden", "latin1.txt"} & {f.name for f in found}
    assert find_documents(corpus / "0.txt") == [corpus / "0.txt"]


def test_the_default_is_the_standard_library() -> None:
    names = {f.name for f in find_documents()}
    assert {"argparse.py", "tokenize.py"} <= names


def test_text_with_a_character_on_the_edge_of_what_is_looked_at(tmp_path: Path) -> None:
    for shift in range(4):
        (tmp_path / "t.txt").write_text("a" * (4094 + shift - 3) + "😀" * 3, encoding="utf-8")
        assert find_documents(tmp_path)


def test_missing_or_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        find_documents(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no text in it"):
        find_documents(tmp_path)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_any_text_survives(kind: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer() if kind == "bytes" else Tokenizer.train(["hello hello world\n" * 50], 300)
    tokenizer.save(tmp_path / "t.json")
    again = Tokenizer.load(tmp_path / "t.json")
    for text in ("hello world", "  tabs\tand\n\nlines", "naïve 😀 中文", "<|endoftext|>", ""):
        assert again.decode(tokenizer.encode(text)) == text
    assert again.vocab_size == tokenizer.vocab_size
    assert again.end not in again.encode("the end: <|endoftext|>")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_the_bytes_of_tokens_are_those_of_the_text(kind: str) -> None:
    tokenizer = Tokenizer() if kind == "bytes" else Tokenizer.train(["hello naïve 😀 world\n" * 50], 300)
    text = "naïve 😀\t\x00\x7f\xa0\xad 中文\n"
    tokens = tokenizer.encode(text)
    assert b"".join(tokenizer.bytes_of([t]) for t in tokens) == tokenizer.bytes_of(tokens) == text.encode()
    assert tokenizer.bytes_of([tokenizer.end]) == b""


def test_a_vocabulary_below_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 257"):
        Tokenizer.train(["x"], 256)


def documents_of(tokens: np.ndarray, tokenizer: Tokenizer) -> set[str]:
    ends = np.flatnonzero(tokens == tokenizer.end)
    return {tokenizer.decode(p.tolist()) for p in np.split(np.asarray(tokens), ends + 1) if len(p)}


def test_the_splits_share_no_document_and_lose_none(corpus: Path, tmp_path: Path) -> None:
    files = prepare(corpus, tmp_path / "kept", tokenizer="bytes", validation_share=0.2)
    train, validation = (documents_of(t, files.tokenizer) for t in (files.train, files.validation))
    assert not train & validation
    assert train | validation == {p.read_text() for p in find_documents(corpus)}
    assert 0.1 < len(files.validation) / (len(files.train) + len(files.validation)) < 0.4


def test_a_single_document_is_cut_in_two(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("".join(f"{i} " for i in range(1000)))
    files = prepare(tmp_path / "one.txt", tmp_path / "kept", tokenizer="bytes")
    text = (tmp_path / "one.txt").read_text()
    assert files.tokenizer.decode(files.train.tolist()) + files.tokenizer.decode(files.validation.tolist()) == text


def test_a_prepared_corpus_is_reused_until_it_changes(corpus: Path, tmp_path: Path) -> None:
    calls: list[int] = []
    first = prepare(corpus, tmp_path / "kept", vocab_size=300, progress=lambda d, t: calls.append(d))
    assert calls
    calls.clear()
    again = prepare(corpus, tmp_path / "kept", vocab_size=300, progress=lambda d, t: calls.append(d))
    assert not calls
    assert np.array_equal(first.train, again.train)
    (corpus / "0.txt").write_text("something else entirely")
    prepare(corpus, tmp_path / "kept", vocab_size=300, progress=lambda d, t: calls.append(d))
    assert calls


def batches(**kw) -> Batches:
    return Batches(np.arange(103, dtype=np.uint16), **{"batch": 3, "context": 5, "seed": 1, **kw})


def test_an_epoch_takes_each_window_once_and_targets_are_one_ahead() -> None:
    loader = batches(batch=1)
    seen = []
    for _ in range(20):
        x, y = loader.next()
        assert torch.equal(y, x + 1)
        seen += x.flatten().tolist()
    assert sorted(seen) == list(range(100))
    assert loader.epoch == 0
    loader.next()
    assert loader.epoch == 1


def test_the_position_can_be_saved_and_taken_up() -> None:
    loader = batches()
    for _ in range(10):
        loader.next()
    state = loader.state_dict()
    expected = [loader.next()[0] for _ in range(10)]
    again = batches(seed=7)
    again.load_state_dict(state)
    for x in expected:
        assert torch.equal(again.next()[0], x)


def test_too_little_text_for_a_batch_is_said() -> None:
    with pytest.raises(DataError, match="has 103 tokens, less than one batch of 21 x 5"):
        batches(batch=21)


def test_validation_batches_spread_over_the_text() -> None:
    first, second = batches().spread(2)
    starts = torch.cat([first[0], second[0]])[:, 0].tolist()
    assert starts == [0, 15, 30, 50, 65, 80]
    assert len(batches().spread(1000)) == 6

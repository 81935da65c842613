"""A corpus as two files of token numbers, train and validation, memory-mapped; made once, kept in a folder."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .corpus import DataError, find_documents
from .tokenizer import Tokenizer

SAMPLE_BYTES = 4 << 20  # of text to train a tokenizer on: enough for vocabularies of some thousands
BATCH_BYTES = 1 << 20  # of text to encode at once


@dataclass
class TokenFiles:
    """A prepared corpus: its tokenizer, and the tokens of each split as a read-only memory map."""

    tokenizer: Tokenizer
    train: np.ndarray
    validation: np.ndarray


def prepare(
    data: str | Path | None,
    folder: Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 4096,
    validation_share: float = 0.05,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TokenFiles:
    """The corpus at `data` (see find_documents), tokenized into `folder`; taken from there if it is there already.

    Whole documents go to one split or the other, chosen by a hash of their text, so equal documents never stand in
    both. A corpus of one document is cut in two instead.

    Args:
        tokenizer: "bpe", trained on the training split, or "bytes".
        progress: called with bytes done and bytes in all.

    Raises:
        DataError: the corpus is missing, empty, or too small to be split.
        OSError: the folder cannot be written.
    """
    documents = find_documents(data)

    def write(made: Path) -> None:
        texts = [p.read_text(encoding="utf-8", errors="replace") for p in documents]
        _write(made, *_split(texts, validation_share), tokenizer, vocab_size, progress)

    ready = kept(folder, documents, [tokenizer, vocab_size, validation_share], write)
    made_by, (train, validation) = read_kept(ready, ("train", "validation"))
    return TokenFiles(made_by, train, validation)


def kept(folder: Path, documents: Iterable[Path], settings: list[Any], write: Callable[[Path], None]) -> Path:
    """The place in `folder` of what is made of these documents with these settings; made by `write` if it is not there.

    It is there as a whole or not at all, whatever happens meanwhile.
    """
    key = {
        "documents": [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in documents],
        "settings": settings,
    }
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    ready = folder / digest
    if not ready.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="unfinished-", dir=folder) as own:
            made = Path(own) / digest
            made.mkdir()
            write(made)
            try:
                made.rename(ready)
            except OSError:  # another run of the same was first
                if not ready.exists():
                    raise
    return ready


def read_kept(ready: Path, names: Iterable[str]) -> tuple[Tokenizer, list[np.ndarray]]:
    """The tokenizer in a folder of `kept`, and arrays of token numbers and the like, mapped into memory.

    Raises:
        DataError: something there is not what was written.
    """
    try:
        return Tokenizer.load(ready / "tokenizer.json"), [_numbers(ready / f"{name}.npy") for name in names]
    except (ValueError, OSError) as error:
        raise DataError(f"{ready}: a damaged cache ({' '.join(str(error).split())[:200]}); remove it") from None


def _numbers(path: Path) -> np.ndarray:
    """An array as it was written, mapped into memory; ValueError if it is something else."""
    numbers = np.load(path, mmap_mode="r", allow_pickle=False)
    if numbers.ndim != 1 or numbers.dtype not in (np.uint16, np.uint32, np.int64):
        raise ValueError(f"{path.name} is {numbers.dtype}{list(numbers.shape)}, not tokens")
    return numbers


def _split(texts: list[str], share: float) -> tuple[list[str], list[str]]:
    if len(texts) == 1:
        cut = int(len(texts[0]) * (1 - share))
        return [texts[0][:cut]], [texts[0][cut:]]
    ordered = sorted(set(texts), key=lambda t: hashlib.sha256(t.encode("utf-8", "surrogatepass")).digest())
    wanted = share * sum(map(len, ordered))
    validation, taken = set(), 0
    for text in ordered[:-1]:
        if taken >= wanted:
            break
        validation.add(text)
        taken += len(text)
    return [t for t in texts if t not in validation], [t for t in dict.fromkeys(texts) if t in validation]


def _write(
    folder: Path,
    train: list[str],
    validation: list[str],
    kind: str,
    vocab_size: int,
    progress: Callable[[int, int], None],
) -> None:
    if not any(train) or not any(validation):
        raise DataError("the corpus is too small to keep a part of it for validation; give more text with --data")
    if kind == "bpe":
        tokenizer = Tokenizer.train(_sample(train), vocab_size)
    elif kind == "bytes":
        tokenizer = Tokenizer()
    else:
        raise ValueError(f"tokenizer must be bpe or bytes, got {kind!r}")
    tokenizer.save(folder / "tokenizer.json")
    total, done = sum(map(len, train)) + sum(map(len, validation)), 0
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    for split, texts in (("train", train), ("validation", validation)):
        parts = []
        for batch in _in_batches(texts):
            parts += [np.array([*tokens, tokenizer.end], dtype) for tokens in tokenizer.encode_batch(batch)]
            done += sum(map(len, batch))
            progress(done, total)
        np.save(folder / f"{split}.npy", np.concatenate(parts))


def _sample(texts: list[str]) -> Iterator[str]:
    """Every n-th document, so that about SAMPLE_BYTES remain."""
    step = max(1, sum(map(len, texts)) // SAMPLE_BYTES)
    return iter(texts[::step])


def _in_batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

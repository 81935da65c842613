"""Pairs of sentences: files of two languages, a sentence a line, as token numbers, and batches of them."""

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .corpus import DataError
from .tokenizer import Tokenizer
from .tokens import kept, read_kept

SPLITS = {"train": ("train",), "validation": ("val", "valid", "validation", "dev")}  # how files of each are named
LINES = 4096  # to encode at once

Batch = tuple[Tensor, ...]


@dataclass
class Pairs:
    """Token numbers of the sentences of one split, one after the other, and where each begins ([pairs + 1])."""

    source: np.ndarray
    source_starts: np.ndarray
    target: np.ndarray
    target_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.source_starts) - 1

    @property
    def source_lengths(self) -> np.ndarray:
        return np.diff(self.source_starts)

    @property
    def target_lengths(self) -> np.ndarray:
        return np.diff(self.target_starts)


@dataclass
class PairFiles:
    """Prepared pairs: the tokenizer of both languages, and each split."""

    tokenizer: Tokenizer
    train: Pairs
    validation: Pairs


def find_pairs(folder: Path, languages: str | None) -> dict[str, tuple[Path, Path]]:
    """The source's and the target's file of each split: train.en and train.de, or train.en.gz and so on.

    Raises:
        DataError: the folder, the languages or one of the files is missing.
    """
    if not folder.is_dir():
        raise DataError(f"--data {folder}: no such folder; pairs are files such as train.en, train.de, val.en, val.de")
    there = sorted({p.name.removesuffix(".gz").rpartition(".")[2] for p in folder.glob("train.*")})
    source, dash, target = (languages or "").partition("-")
    if not (source and dash and target):
        example = "-".join(there[:2]) if len(there) > 1 else "en-de"
        got = f"got {languages}" if languages else "none was given"
        raise DataError(f"seq2seq.languages must say from what to what, such as {example}; {got}")
    found = {}
    for split, names in SPLITS.items():
        for name in names:
            files = [_plain_or_gzip(folder / f"{name}.{language}") for language in (source, target)]
            if all(files):
                found[split] = (files[0], files[1])
                break
        else:
            raise DataError(
                f"--data {folder}: no {' or '.join(f'{n}.{source}' for n in names)} beside .{target} (or .gz); "
                f"files of training are there in {', '.join(there) or 'no language'}"
            )
    return found  # type: ignore[return-value]


def _plain_or_gzip(path: Path) -> Path | None:
    return next((p for p in (path, path.with_name(f"{path.name}.gz")) if p.is_file()), None)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, which may be gzipped, without their ends and outer spaces.

    Raises:
        DataError: it is not UTF-8, or not gzip.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return [line.strip() for line in content.decode("utf-8").removesuffix("\n").split("\n")]
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: cannot be read as text ({error})") from None


def prepare_pairs(
    data: str | Path | None,
    folder: Path,
    *,
    languages: str | None,
    tokenizer: str = "bpe",
    vocab_size: int = 4096,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> PairFiles:
    """The pairs at `data` (see find_pairs), tokenized into `folder`; taken from there if they are there already.

    Each sentence ends with the tokenizer's end; pairs of which one is empty are left out.

    Args:
        languages: source and target, such as en-de.
        tokenizer: "bpe", trained on both languages of the training pairs, or "bytes".
        progress: called with characters done and in all.

    Raises:
        DataError: files are missing, or those of a split differ in lines.
        OSError: the folder cannot be written.
    """
    if data is None:
        raise DataError("data: objective seq2seq needs a folder of pairs, such as train.en, train.de, val.en, val.de")
    files = find_pairs(Path(data).expanduser(), languages)

    def write(made: Path) -> None:
        texts = {split: [read_lines(path) for path in paths] for split, paths in files.items()}
        for split, (source, target) in texts.items():
            if len(source) != len(target):
                names = " and ".join(path.name for path in files[split])
                raise DataError(f"--data {data}: {names} must have as many lines, got {len(source)} and {len(target)}")
        whole = [[(a, b) for a, b in zip(*both, strict=True) if a and b] for both in texts.values()]
        if not all(whole):
            raise DataError(f"--data {data}: no pair of sentences in {' or '.join(SPLITS)}")
        made_by = Tokenizer()
        if tokenizer == "bpe":
            made_by = Tokenizer.train((line for pair in whole[0] for line in pair), vocab_size)
        made_by.save(made / "tokenizer.json")
        total, done = sum(len(a) + len(b) for pairs in whole for a, b in pairs), 0
        for split, pairs in zip(files, whole, strict=True):
            for side, lines in zip(("source", "target"), zip(*pairs, strict=True), strict=True):
                sentences: list[list[int]] = []
                for i in range(0, len(lines), LINES):
                    part = lines[i : i + LINES]
                    sentences += [[*tokens, made_by.end] for tokens in made_by.encode_batch(part)]
                    done += sum(map(len, part))
                    progress(done, total)
                dtype = np.uint16 if made_by.vocab_size <= 1 << 16 else np.uint32
                np.save(made / f"{split}-{side}.npy", np.concatenate(sentences).astype(dtype))
                np.save(made / f"{split}-{side}-starts.npy", np.cumsum([0, *map(len, sentences)]))

    paths = [path for both in files.values() for path in both]
    ready = kept(folder, paths, ["pairs", tokenizer, vocab_size], write)

    sides = [f"{side}{part}" for side in ("source", "target") for part in ("", "-starts")]
    made_by, arrays = read_kept(ready, [f"{split}-{side}" for split in SPLITS for side in sides])
    return PairFiles(made_by, Pairs(*arrays[:4]), Pairs(*arrays[4:]))


class PairBatches:
    """Endless batches of pairs, in a shuffled order that can be left and taken up again.

    A batch is packed: source tokens and where each sentence begins, what the decoder sees and where each begins, the
    labels, and the batch's share of its step's labels. The decoder sees the end first and then the target; its labels
    are the target and the end.

    Packed pairs have no padding, so that they are not sorted by length: each step is an even draw of the data. Within
    a step, passes are made of pairs of like length, which keeps the longest pass small.

    Args:
        batch: pairs in a pass.
        passes: in a step.
        context: most tokens a sentence may have; pairs with a longer one are left out.
    """

    def __init__(
        self,
        pairs: Pairs,
        end: int,
        batch: int,
        passes: int = 1,
        *,
        context: int,
        seed: int = 0,
        what: str = "training",
    ):
        self.pairs, self.end, self.batch, self.passes, self.seed = pairs, end, batch, passes, seed
        self.usable = np.flatnonzero(np.maximum(pairs.source_lengths, pairs.target_lengths) <= context)
        if len(self.usable) < batch * passes:
            raise DataError(
                f"there are {len(self.usable)} pairs of at most {context} tokens for {what}, less than a step of "
                f"{batch * passes}; give more with --data, lower the batch, or raise the context"
            )
        self.epoch, self.position = 0, 0
        self._start_epoch()

    def _start_epoch(self) -> None:
        self._order = np.random.default_rng([self.seed, self.epoch]).permutation(self.usable)

    def next(self) -> Batch:
        step = self.batch * self.passes
        first = self.position - self.position % step
        if first + step > len(self._order):
            self.epoch, self.position, first = self.epoch + 1, 0, 0
            self._start_epoch()
        rows = self._order[first : first + step]
        lengths = self.pairs.target_lengths[rows]
        rows = rows[np.argsort(self.pairs.source_lengths[rows] + lengths, kind="stable")]
        begin = self.position - first
        self.position += self.batch
        return self._packed(rows[begin : begin + self.batch], int(lengths.sum()))

    def spread(self, count: int) -> list[Batch]:
        """Batches of about `count` pairs in all, spread evenly over those there are; moves nothing."""
        count = min(count, len(self.usable))
        chosen = self.usable[np.arange(count) * len(self.usable) // count]
        parts = np.split(chosen, range(self.batch, count, self.batch))
        return [self._packed(rows, int(self.pairs.target_lengths[rows].sum())) for rows in parts]

    def _packed(self, rows: Sequence[int] | np.ndarray, labels_of_step: int) -> Batch:
        source, source_starts = _gather(self.pairs.source, self.pairs.source_starts, rows)
        labels, target_starts = _gather(self.pairs.target, self.pairs.target_starts, rows)
        target = labels.roll(1)
        target[target_starts[:-1].long()] = self.end
        share = torch.tensor(len(labels) / labels_of_step)
        return source, source_starts, target, target_starts, labels, share

    def state_dict(self) -> dict[str, int]:
        return {"seed": self.seed, "epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seed, self.epoch, self.position = (int(state[k]) for k in ("seed", "epoch", "position"))
        self._start_epoch()


def _gather(tokens: np.ndarray, starts: np.ndarray, rows: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
    """Sentences `rows` one after the other: tokens int64, and where each begins, int32."""
    parts = [tokens[starts[i] : starts[i + 1]] for i in rows]
    begins = np.cumsum([0, *map(len, parts)])
    return torch.from_numpy(np.concatenate(parts).astype(np.int64)), torch.from_numpy(begins.astype(np.int32))

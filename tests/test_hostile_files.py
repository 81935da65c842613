"""Files that mean harm, or are broken: a typed error in under a second, no code run, and little memory.

Memory is the peak of what the process holds (VmHWM) beyond what it held before.
"""

import gzip
import io
import json
import os
import pickle
import stat
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

for package in ("safetensors", "tokenizers", "yaml", "jsonargparse", "PIL"):
    pytest.importorskip(package)

from bigmodel_fast.cli.arguments import parse  # noqa: E402
from bigmodel_fast.data import DataError, Images, Tokenizer, prepare  # noqa: E402
from bigmodel_fast.models import GPT, GPTConfig  # noqa: E402
from bigmodel_fast.optim import AdamW  # noqa: E402
from bigmodel_fast.train import CheckpointError, ConfigError, TrainConfig, load_checkpoint, save_checkpoint  # noqa: E402
from bigmodel_fast.train.durable import digest  # noqa: E402

SECONDS, BYTES = 1.0, 200 << 20
SHAPE = {"vocab_size": 257, "context": 8, "layers": 1, "heads": 2, "width": 16}
GIB = 1 << 30


class Harm:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


# ---- checkpoints: each changes a good one, and its checksums with it ----


def header(entries: dict, data: bytes = b"", length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: str = "F32", shape=(2,), offsets=(0, 8), **more) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def weights(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_bytes(content)


def sparse(name: str, size: int, begin: bytes = b"") -> Callable[[Path], None]:
    """A file of many zeros that takes no place."""

    def write(folder: Path) -> None:
        with (folder / name).open("wb") as f:
            f.write(begin)
            f.truncate(size)

    return write


def state(**changes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        path = folder / "state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return write


def model(**changes) -> Callable[[Path], None]:
    return state(model={**SHAPE, **changes})


def file_named(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        files = json.loads((folder / "state.json").read_text())["files"]
        state(files={**files, name: {"bytes": 3, "sha256": "0" * 64}})(folder)

    return write


def link(name: str, target: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(target)

    return write


def pipe(name: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return write


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content)


def pickled(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(pickle.dumps(Harm(folder.parent / "harm")))


CHECKPOINTS: dict[str, Callable[[Path], None]] = {
    "weights: a header that says 2^63 bytes": weights(header({}, length=1 << 63)),
    "weights: a header of a GiB": sparse("model.safetensors", 2 * GIB, struct.pack("<Q", GIB)),
    "weights: empty": weights(b""),
    "weights: five bytes": weights(b"abcde"),
    "weights: nested without end": weights(struct.pack("<Q", 200_000) + b"[" * 200_000),
    "weights: no JSON": weights(struct.pack("<Q", 4) + b"{\xff\xff}"),
    "weights: a list": weights(struct.pack("<Q", 2) + b"[]"),
    "weights: a tensor of 2^60 numbers": weights(header({"a": tensor(shape=[1 << 30, 1 << 30])}, bytes(8))),
    "weights: a size that overflows": weights(header({"a": tensor(shape=[1 << 32, 1 << 32, 4])}, bytes(8))),
    "weights: overlapping tensors": weights(header({"a": tensor(), "b": tensor(offsets=(4, 12))}, bytes(12))),
    "weights: one in the other's place": weights(header({"a": tensor(), "b": tensor()}, bytes(8))),
    "weights: a gap": weights(header({"a": tensor(), "b": tensor(offsets=(12, 20))}, bytes(20))),
    "weights: beyond the file": weights(header({"a": tensor()}, bytes(4))),
    "weights: more than its tensors": weights(header({"a": tensor()}, bytes(12))),
    "weights: a negative size": weights(header({"a": tensor(shape=[-2])}, bytes(8))),
    "weights: offsets backwards": weights(header({"a": tensor(shape=[0], offsets=(8, 8)), "b": tensor()}, bytes(8))),
    "weights: an unknown dtype": weights(header({"a": tensor("F31")}, bytes(8))),
    "weights: a dtype that is a list": weights(header({"a": tensor(["F32"])}, bytes(8))),
    "weights: a fraction of an element": weights(header({"a": tensor(shape=[1.5])}, bytes(8))),
    "weights: a name twice": weights(
        struct.pack("<Q", 118) + b'{"a":%b,"a":%b}' % ((json.dumps(tensor()).encode(),) * 2) + bytes(8)
    ),
    "weights: a pickle": pickled("model.safetensors"),
    "weights: a link out of the folder": link("model.safetensors", "/etc/passwd"),
    "weights: a link to an endless file": link("model.safetensors", "/dev/zero"),
    "weights: a pipe": pipe("model.safetensors"),
    "state: a pipe": pipe("state.json"),
    "state: a link to an endless file": link("state.json", "/dev/zero"),
    "state: 3 GiB": sparse("state.json", 3 * GIB),
    "state: a pickle": pickled("state.json"),
    "state: nested without end": text("state.json", '{"format": 1, "files": ' + "[" * 500_000),
    "state: a number of a million digits": text("state.json", '{"format": ' + "9" * 1_000_000 + "}"),
    "state: a step that is text": state(step="../../x"),
    "state: files that lead out": file_named("../../../../etc/passwd"),
    "state: an absolute file": file_named("/etc/passwd"),
    "state: a file in a folder": file_named("..\\x"),
    "state: files that are a list": state(files=[1, 2]),
    "state: a model of 10^12 layers": model(layers=10**12),
    "state: a model 10^9 wide": model(width=10**9),
    "state: a model of 10^9 tokens": model(vocab_size=10**9),
    "state: a context of 10^9": model(context=10**9),
    "state: a context that needs memory": model(layout="modern", context=1 << 20, width=16),
    "state: a model with an unknown part": model(hook="os.system"),
    "state: a model that is text": state(model="GPT"),
    "tokenizer: a pickle": pickled("tokenizer.json"),
    "tokenizer: nested without end": text("tokenizer.json", "[" * 300_000),
    "tokenizer: 3 GiB": sparse("tokenizer.json", 3 * GIB),
    "tokenizer: a list": text("tokenizer.json", "[]"),
    "tokenizer: of another kind": text("tokenizer.json", '{"type": "python", "path": "/etc/passwd"}'),
    "tokenizer: a vocabulary of text": text(
        "tokenizer.json", '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}'
    ),
    "optimizer: of other shapes": lambda folder: (folder / "optimizer.safetensors").write_bytes(
        header({"norm.weight/exp_avg": tensor()}, bytes(8))
    ),
}


def checkpoint(folder: Path, harm: Callable[[Path], None]) -> Callable[[], object]:
    gpt = GPT(GPTConfig(**SHAPE))
    optimizer = AdamW(gpt.parameters())
    path = save_checkpoint(
        folder / "run" / "checkpoints", step=1, model=gpt, optimizer=optimizer, tokenizer=Tokenizer(),
        state={"model": SHAPE},
    )  # fmt: skip
    harm(path)
    kept = (path / "state.json").lstat()
    if stat.S_ISREG(kept.st_mode) and kept.st_size < 10_000:
        with_checksums(path)

    def load() -> None:
        found = load_checkpoint(folder / "run")
        found.tokenizer()
        found.model()
        found.restore(gpt, optimizer)

    return load


def with_checksums(path: Path) -> None:
    """As its maker would: sizes and sums in state.json are those of the files."""
    try:
        values = json.loads((path / "state.json").read_text())
        for name, entry in values["files"].items():
            file = path / name
            if file.parent == path and file.is_file() and not file.is_symlink():
                size = file.stat().st_size
                entry.update(bytes=size, sha256=digest(file) if size < 1 << 20 else "0" * 64)
    except (ValueError, AttributeError, UnicodeDecodeError):
        return
    (path / "state.json").write_text(json.dumps(values))


# ---- data ----


def idx(shape: tuple[int, ...], data: bytes) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + data


def zeros(size: int) -> bytes:
    """gzip of so many zeros."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1, mtime=0) as f:
        for _ in range(size >> 20):
            f.write(bytes(1 << 20))
    return out.getvalue()


def images(content: bytes, name: str = "train-images-idx3-ubyte") -> Callable[[Path], Callable[[], object]]:
    def make(folder: Path) -> Callable[[], object]:
        (folder / name).write_bytes(content)
        (folder / name.replace("images-idx3", "labels-idx1")).write_bytes(idx((2,), b"\0\1"))
        return lambda: Images.load(folder / name)

    return make


def npz(**members: bytes) -> Callable[[Path], Callable[[], object]]:
    def make(folder: Path) -> Callable[[], object]:
        with zipfile.ZipFile(folder / "x.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name, content in members.items():
                archive.writestr(f"{name}.npy", content)
        return lambda: Images.load(folder / "x.npz")

    return make


def npy(shape: str, dtype: str = "|u1", data: bytes = b"") -> bytes:
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text) + 1) + text + b"\n" + data


def pickled_npz(folder: Path) -> Callable[[], object]:
    np.savez(folder / "x.npz", images=np.array([Harm(folder / "harm")], object), labels=np.array([0]))
    return lambda: Images.load(folder / "x.npz")


def picture(content: bytes) -> Callable[[Path], Callable[[], object]]:
    def make(folder: Path) -> Callable[[], object]:
        (folder / "a").mkdir()
        (folder / "a" / "x.png").write_bytes(content)
        return lambda: Images.load(folder, size=8)

    return make


def png(width: int, height: int) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def config(content: str) -> Callable[[Path], Callable[[], object]]:
    def make(folder: Path) -> Callable[[], object]:
        (folder / "c.yaml").write_text(content.replace("HARM", str(folder / "harm")))
        argv = ["--config", str(folder / "c.yaml")]
        return lambda: TrainConfig.from_dict(parse(argv, "pretrain", TrainConfig, "")).check()

    return make


def damaged_cache(content: Callable[[Path], bytes]) -> Callable[[Path], Callable[[], object]]:
    def make(folder: Path) -> Callable[[], object]:
        (folder / "text").mkdir()
        (folder / "text" / "a.txt").write_text("all work and no play " * 100)
        prepare(folder / "text", folder / "cache", tokenizer="bytes")
        made = next((folder / "cache").iterdir())
        (made / "train.npy").write_bytes(content(folder))
        return lambda: prepare(folder / "text", folder / "cache", tokenizer="bytes")

    return make


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{c}: &{c} [{', '.join(['*' + b] * 9)}]\n" for b, c in zip("abcdefghijk", "bcdefghijkl", strict=True)
)
DATA: dict[str, Callable[[Path], Callable[[], object]]] = {
    "idx: 2^96 numbers": images(idx((2**32 - 1,) * 3, b"")),
    "idx: truncated": images(idx((2, 8, 8), bytes(5))),
    "idx: of 200 dimensions": images(bytes([0, 0, 8, 200]) + bytes(40)),
    "idx: a gzip that says little and holds much": lambda folder: images(
        gzip.compress(idx((2, 8, 8), b"")) + zeros(GIB >> 2), "train-images-idx3-ubyte.gz"
    )(folder),
    "idx: a gzip of pictures of nothing": lambda folder: images(
        gzip.compress(idx((32 << 20, 8, 1), b"")) + zeros(GIB >> 2), "train-images-idx3-ubyte.gz"
    )(folder),
    "npz: a pickle": pickled_npz,
    "npz: an array of 2^40 bytes": npz(images=npy("(1099511627776, 1, 1)"), labels=npy("(1,)", data=b"\0")),
    "npz: a bomb": lambda folder: npz(
        images=npy(f"({GIB >> 2}, 1, 1)", data=bytes(GIB >> 2)), labels=npy("(1,)", data=b"\0")
    )(folder),
    "npz: no arrays": npz(images=b"hello", labels=b"world"),
    "npz: no zip": lambda folder: (
        (folder / "x.npz").write_bytes(b"PK\3\4 not really"), lambda: Images.load(folder / "x.npz")
    )[1],
    "picture: 60,000 x 60,000": picture(png(60_000, 60_000)),
    "picture: 12,000 x 12,000": picture(png(12_000, 12_000)),
    "picture: a pickle": picture(pickle.dumps("x")),
    "config: an object of Python": config("data: !!python/object/apply:os.system ['touch HARM']\n"),
    "config: a billion laughs": config(LAUGHS + "data: *l\n"),
    "config: nested without end": config("data: " + "[" * 100_000),
    "config: a tag of its own": config("out: !run 'touch HARM'\n"),
    "config: 8 MiB": config("# " + "x" * (8 << 20)),
    "config: not UTF-8": config("data: \x00\x01"),
    "cache: a pickle": damaged_cache(lambda folder: pickle.dumps(Harm(folder / "harm"))),
    "cache: objects": damaged_cache(lambda folder: npy("(1,)", "|O", pickle.dumps([Harm(folder / "harm")]))),
    "cache: truncated": damaged_cache(lambda _: npy("(1000000,)", "<u2", bytes(10))),
}  # fmt: skip


def held(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the most since the peak was forgotten)."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) << 10


def refuses(read: Callable[[], object], folder: Path) -> str:
    """What the typed error says that `read` must raise in time, in little memory, having run nothing."""
    clear = Path("/proc/self/clear_refs")
    if not os.access(clear, os.W_OK):
        pytest.skip("needs /proc/self/clear_refs to measure memory")
    clear.write_text("5")
    before, started = held("VmRSS"), time.perf_counter()
    with pytest.raises((CheckpointError, DataError, ConfigError)) as caught:
        read()
    seconds, grown = time.perf_counter() - started, held("VmHWM") - before
    assert seconds < SECONDS
    assert grown < BYTES
    assert not (folder / "harm").exists()
    assert not list(folder.rglob("harm"))
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    return text


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint(name: str, tmp_path: Path) -> None:
    refuses(checkpoint(tmp_path, CHECKPOINTS[name]), tmp_path)


@pytest.mark.parametrize("name", DATA)
def test_data(name: str, tmp_path: Path) -> None:
    refuses(DATA[name](tmp_path), tmp_path)


def test_what_is_harmless_is_read(tmp_path: Path) -> None:
    checkpoint(tmp_path, lambda folder: None)()
    images(gzip.compress(idx((2, 8, 8), bytes(128))), "train-images-idx3-ubyte.gz")(tmp_path)()
    images(idx((2, 8, 8), bytes(128)))(tmp_path)()
    npz(images=npy("(2, 8, 8)", data=bytes(128)), labels=npy("(2,)", data=b"\0\1"))(tmp_path)()
    picture(png(300, 300))(tmp_path)
    config("steps: 3\nmodel: {layers: 2}\n")(tmp_path)()

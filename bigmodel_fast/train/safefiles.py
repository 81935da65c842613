"""Files that nobody vouches for: sizes, kinds and headers are checked before anything is read or allocated.

Only JSON and safetensors are read, which hold no code. A file must be a plain file (no link, pipe or device) and lie in
the folder it belongs to.
"""

import json
import math
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from .errors import CheckpointError

JSON_BYTES = 4 << 20  # Python's objects take up to twenty times as much
HEADER_BYTES = 4 << 20  # some 40,000 tensors
MAX_DIMS = 16

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A tensor of a safetensors file, as its header has it."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def damaged(path: Path, why: str) -> NoReturn:
    """CheckpointError for a file of a checkpoint."""
    raise CheckpointError(f"{path.parent}: damaged ({path.name} {why})")


def plain_file(path: Path) -> int:
    """Bytes of a file; CheckpointError for what is missing, a link, a pipe, a device or a folder."""
    try:
        found = path.lstat()
    except OSError as error:
        damaged(path, "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}")
    if not stat.S_ISREG(found.st_mode):
        damaged(path, "is a link" if stat.S_ISLNK(found.st_mode) else "is no plain file")
    return found.st_size


def plain_name(name: str) -> bool:
    """Whether `name` is that of a file within a folder, and cannot lead out of it."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\\0") and name.isprintable()


def read_json(path: Path) -> Any:
    """The value in a JSON file of at most JSON_BYTES.

    Raises:
        CheckpointError: it is too large, too deep, or no JSON.
    """
    size = plain_file(path)
    if size > JSON_BYTES:
        damaged(path, f"has {size} bytes; at most {JSON_BYTES} are read")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        damaged(path, f"is no JSON: {error}")
    except OSError as error:
        damaged(path, f"cannot be read: {error.strerror}")


def parse_json(text: bytes) -> Any:
    """A JSON value; ValueError for what is none, twice the same key, NaN and Infinity, and for nesting without end."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key stands twice")
    return values


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def read_header(path: Path) -> dict[str, Entry]:
    """What a safetensors file holds, after its header and size were found to be in order; no tensor is read.

    Raises:
        CheckpointError: an unknown dtype, a size that does not fit a shape, tensors that overlap, leave gaps or reach
            beyond the file, or no safetensors file.
    """
    header, available = _raw_header(path)
    header.pop("__metadata__", None)
    try:
        spans = sorted((*_span(name, value), name) for name, value in header.items())
        position = 0
        for begin, end, name in spans:
            if begin != position:
                raise ValueError(f"{name[:80]!r} {'overlaps another tensor' if begin < position else 'leaves a gap'}")
            position = end
        if position != available:
            raise ValueError(f"its tensors take {position} bytes, there are {available}")
    except ValueError as error:
        damaged(path, f"is no safetensors file: {error}")
    return {name: Entry(DTYPES[value["dtype"]], tuple(value["shape"])) for name, value in header.items()}


def shard_offsets(path: Path) -> dict[str, tuple[int, ...]]:
    """Where in the whole tensors those of a file begin, if it is one of torch.distributed.checkpoint's shards."""
    header, _ = _raw_header(path)
    try:
        text = header.get("__metadata__", {}).get("DCP_SHARDING_INFO")
        offsets = {name: value["saved_offsets"] for name, value in parse_json(text.encode()).items()} if text else {}
        for name, offset in offsets.items():
            if not _whole(offset) or len(offset) != len(header[name]["shape"]):
                raise ValueError(f"{name[:80]!r} has no proper offset")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        damaged(path, f"is no shard: {error}")
    return {name: tuple(offset) for name, offset in offsets.items()}


def _raw_header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, as it stands there, and how many bytes follow it."""
    size = plain_file(path)
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            damaged(path, "is truncated in its header")
        if length > HEADER_BYTES:
            damaged(path, f"has a header of {length} bytes; at most {HEADER_BYTES} are read")
        text = f.read(length)
    try:
        header = parse_json(text)
    except ValueError as error:
        damaged(path, f"is no safetensors file: {error}")
    if not isinstance(header, dict):
        damaged(path, "is no safetensors file: its header is no object")
    return header, size - 8 - length


def _span(name: str, value: Any) -> tuple[int, int]:
    """First byte and end of a tensor; ValueError if its size is not that of its shape."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name[:80]!r} needs dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{name[:80]!r} has the unknown dtype {str(value['dtype'])[:20]!r}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _whole(shape) or len(shape) > MAX_DIMS or not _whole(offsets) or len(offsets) != 2:
        raise ValueError(f"{name[:80]!r} has no proper shape and offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name[:80]!r} has {end - begin} bytes, which is not the size of its shape")
    return begin, end


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 62 for n in numbers)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, on the CPU.

    Raises:
        CheckpointError: see `read_header`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        damaged(path, f"cannot be read: {error}")


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """A safetensors file; OSError if it cannot be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # a full disk, most likely
        raise OSError(f"{path.name}: {error}") from None

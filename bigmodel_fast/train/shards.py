"""Tensors that several ranks hold a part of each: one safetensors file a rank, by torch.distributed.checkpoint.

Such files, and whole ones, are read by any number of ranks: each takes from them what it holds.
"""

import math
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import safefiles
from .errors import CheckpointError
from .safefiles import Entry

PREFIX = "shard-"  # of the names that torch.distributed.checkpoint gives its files


def write_shards(tensors: dict[str, Tensor], folder: Path, group: Any) -> None:
    """Writes this rank's parts of DTensors, and of the other tensors what it is asked to; all of `group` call it.

    Raises:
        OSError: on all ranks, if one of them could not write.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        dcp.save(tensors, storage_writer=writer, process_group=group)
    except CheckpointException as error:
        reasons = "; ".join(f"rank {rank}: {found[0]}" for rank, found in error.failures.items())
        raise OSError(f"the shards could not be written ({reasons})") from None


def read_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fills `tensors`, DTensors or whole ones, in place from the safetensors files in `folder`; alone, each rank.

    Raises:
        CheckpointError: something is not in the files, or of another shape.
    """
    import torch.distributed.checkpoint as dcp

    try:
        with warnings.catch_warnings(action="ignore"):
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    except Exception as error:  # torch wraps what went wrong in exceptions of its own
        text = " ".join(str(error).split())[-200:]
        raise CheckpointError(f"{folder}: its shards do not hold this model ({text})") from None


def whole_tensors(folder: Path) -> dict[str, Entry]:
    """What the safetensors files in a folder hold together; CheckpointError for damaged ones, and for missing parts."""
    found: dict[str, Entry] = {}
    elements: dict[str, int] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header, offsets = safefiles.read_header(path), safefiles.shard_offsets(path)
        for name, part in header.items():
            offset = offsets.get(name, (0,) * len(part.shape))
            end = tuple(o + n for o, n in zip(offset, part.shape, strict=True))
            before = found[name].shape if name in found else end
            if len(before) != len(end):
                safefiles.damaged(path, f"has {name[:80]!r} in {len(end)} dimensions, others in {len(before)}")
            found[name] = Entry(part.dtype, tuple(map(max, end, before)))
            elements[name] = elements.get(name, 0) + math.prod(part.shape)
    for name, whole in found.items():
        if elements[name] < math.prod(whole.shape):
            raise CheckpointError(f"{folder}: damaged (parts of {name[:80]!r} are missing)")
    return found


def has_shards(model: torch.nn.Module) -> bool:
    """Whether some of a model's parameters are DTensors."""
    return any(hasattr(p, "to_local") for p in model.parameters())

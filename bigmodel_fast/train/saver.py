"""Checkpoints written while training goes on."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..data import Tokenizer
from . import durable
from .checkpoint import (
    MODEL,
    OPTIMIZER,
    Tensors,
    model_tensors,
    optimizer_tensors,
    step_folder,
    write_checkpoint,
)
from .safefiles import write_tensors
from .shards import write_shards


class Saver:
    """Copies weights and optimizer states, and writes them in a thread of its own.

    Args:
        folder: of the checkpoints.
        keep, keep_best: see save_checkpoint.
        background: False: `save` writes before it returns, from the tensors themselves, and takes no memory.
        writes: whether this process makes the checkpoint's folder; others write their shards only.
        group: processes that each hold a shard, or None where this one holds everything.
    """

    def __init__(self, folder: Path, keep: int, keep_best: int, *, background: bool, writes: bool, group: Any = None):
        self._folder, self._keep, self._keep_best = folder, keep, keep_best
        self._writes, self._group = writes, group
        self._thread = ThreadPoolExecutor(1, "checkpoint") if background else None
        self._copies: Tensors = {}  # memory that is used again
        self._pending: Future[Path] | None = None

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer | None,
        state: dict[str, Any],
    ) -> None:
        """Begins a checkpoint; `wait` must have seen the one before. OSError if nothing could be written at once."""
        if not self._writes and self._group is None:
            self._pending = Future()
            self._pending.set_result(step_folder(self._folder, step))
            return
        tensors = (model_tensors(model), optimizer_tensors(model, optimizer))
        if self._thread is not None:
            tensors = (self._copied(tensors[0], "model"), self._copied(tensors[1], "optimizer"))

        def fill(unfinished: Path) -> None:
            if self._group is not None:
                write_shards({**tensors[0], **tensors[1]}, unfinished, self._group)
                return
            write_tensors(tensors[0], unfinished / MODEL)
            write_tensors(tensors[1], unfinished / OPTIMIZER)

        def write() -> Path:
            if self._writes:
                return write_checkpoint(self._folder, step, fill, tokenizer, state, self._keep, self._keep_best)
            final = step_folder(self._folder, step)
            fill(durable.aside(final))
            return final

        self._pending = Future() if self._thread is None else self._thread.submit(write)
        if self._thread is None:
            self._pending.set_result(write())

    def _copied(self, tensors: Tensors, kind: str) -> Tensors:
        copies = {}
        for name, tensor in tensors.items():
            kept = self._copies.get(f"{kind}/{name}")
            if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
                kept = torch.empty_like(tensor, device=None if self._group is not None else "cpu")
                self._copies[f"{kind}/{name}"] = kept
            copies[name] = kept.copy_(tensor.detach())
        return copies

    def poll(self) -> Path | None:
        """The checkpoint that was finished since the last call, if any; OSError if it could not be written."""
        return self.wait() if self._pending is not None and self._pending.done() else None

    def wait(self) -> Path | None:
        """As `poll`, once nothing is being written any more."""
        pending, self._pending = self._pending, None
        return pending.result() if pending is not None else None

    def close(self) -> None:
        """Ends the thread, when it has written what it has begun."""
        if self._thread is not None:
            self._thread.shutdown()

"""A pass: forward, loss and backward of one batch, and how its batch reaches the device."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from .objectives import Batch, Loader

WARM_UPS = 3  # passes before one is recorded: kernels are compiled and memory is allocated in them

T = TypeVar("T")


class Ahead(Iterator[T]):
    """What an iterator gives, on the device. On a GPU one item is copied ahead, from pinned memory, while the one
    before it is computed; on the CPU they are handed on as they are.

    Args:
        items: tensors in tuples, lists and dictionaries; what else is in them is left as it is.
    """

    def __init__(self, items: Iterator[T], device: torch.device):
        self._items, self._device = items, device
        self._ahead: list[T] = []  # one, or none
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __next__(self) -> T:
        item = self._ahead.pop() if self._ahead else self._copied(next(self._items))
        self._wait_for(item)
        return item

    def look_ahead(self) -> None:
        """Draws the next item and begins to copy it; to be called when the GPU has enough to do. No-op on CPU."""
        if self._copies is not None and not self._ahead:
            self._ahead = [self._copied(item) for item in islice(self._items, 1)]

    def _copied(self, item: T) -> T:
        return item if self._copies is None else tree_map_only(Tensor, self._copy, item)

    def _copy(self, t: Tensor) -> Tensor:
        with torch.cuda.stream(self._copies):
            return t.contiguous().pin_memory().to(self._device, non_blocking=True)

    def _wait_for(self, item: T) -> None:
        if self._copies is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._copies)
            for t in tree_leaves(item):
                if isinstance(t, Tensor):
                    t.record_stream(stream)  # its memory was taken on the other stream


class Feed(Generic[T]):
    """A loader's batches on the device, one of them copied ahead.

    `state_dict` is the position behind the last batch that was handed out, whatever has been copied ahead.

    Args:
        part: what this process takes of a batch.
    """

    def __init__(self, batches: Loader[T], device: torch.device, part: Callable[[T], T] = lambda batch: batch):
        self._batches, self._device, self._part = batches, device, part
        self._begin()

    def next(self) -> T:
        batch, self._state = next(self._ahead)
        return batch

    def look_ahead(self) -> None:
        self._ahead.look_ahead()

    def state_dict(self) -> dict[str, int]:
        return self._state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._batches.load_state_dict(state)
        self._begin()

    def _begin(self) -> None:
        self._state = self._batches.state_dict()
        self._ahead: Ahead[tuple[T, dict[str, int]]] = Ahead(self._drawn(), self._device)

    def _drawn(self) -> Iterator[tuple[T, dict[str, int]]]:
        """Each with the position behind it."""
        while True:
            yield self._part(self._batches.next()), self._batches.state_dict()


class GraphedPass:
    """A pass that is recorded as a CUDA graph at its first call and replayed from then on.

    Gradients are added to those there are, in memory that the graph knows, so they must be set to zero in place.

    Args:
        run: makes the loss of a batch, calls backward, and returns the loss, a scalar.
        parameters: those that get gradients.
    """

    def __init__(self, run: Callable[..., Tensor], parameters: list[Tensor]):
        self._run, self._parameters = run, parameters
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *batch: Tensor) -> Tensor:
        if self._graph is None:
            self._record(batch)
        assert self._graph is not None
        for kept, new in zip(self._batch, batch, strict=True):
            kept.copy_(new)
        self._graph.replay()
        return self._loss.clone()

    def _record(self, batch: Batch) -> None:
        """Gradients are zero before and after it: it is the first pass of a run's first step."""
        self._batch = tuple(t.clone() for t in batch)
        device = batch[0].device
        for p in self._parameters:
            p.grad = torch.zeros_like(p)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run(*self._batch)
        torch.cuda.current_stream(device).wait_stream(stream)
        torch._foreach_zero_([p.grad for p in self._parameters if p.grad is not None])
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self._run(*self._batch)

"""A pass: forward, loss and backward of one batch, and how its batch reaches the device."""

from collections.abc import Callable

import torch
from torch import Tensor

from .objectives import Batch, Loader

WARM_UPS = 3  # passes before one is recorded: kernels are compiled and memory is allocated in them


class Feed:
    """Batches on the device. On a GPU one is copied ahead, from pinned memory, while the one before it is computed.

    `state_dict` is the position behind the last batch that was handed out, whatever has been copied ahead.

    Args:
        part: what this process takes of a batch.
    """

    def __init__(self, batches: Loader, device: torch.device, part: Callable[[Batch], Batch] = lambda batch: batch):
        self._batches, self._device, self._part = batches, device, part
        self._ahead: tuple[Batch, dict[str, int]] | None = None  # and the position behind it
        self._state = batches.state_dict()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def next(self) -> Batch:
        batch, self._state = self._ahead or self._draw()
        self._ahead = None
        self._wait_for(batch)
        return batch

    def look_ahead(self) -> None:
        """Draws the next batch and begins to copy it; to be called when the GPU has enough to do. No-op on CPU."""
        if self._copies is not None and self._ahead is None:
            self._ahead = self._draw()

    def state_dict(self) -> dict[str, int]:
        return self._state

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._batches.load_state_dict(state)
        self._ahead, self._state = None, self._batches.state_dict()

    def _draw(self) -> tuple[Batch, dict[str, int]]:
        batch = self._part(self._batches.next())
        return tuple(map(self._copy, batch)), self._batches.state_dict()

    def _wait_for(self, batch: Batch) -> None:
        if self._copies is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_stream(self._copies)
            for t in batch:
                t.record_stream(stream)  # its memory was taken on the other stream

    def _copy(self, t: Tensor) -> Tensor:
        if self._copies is None:
            return t
        with torch.cuda.stream(self._copies):
            return t.contiguous().pin_memory().to(self._device, non_blocking=True)


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

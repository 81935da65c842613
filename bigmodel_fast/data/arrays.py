"""Samples in memory, as bytes or floats, and a loader of their batches that the native trainer reads in place."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the native library)
from .._C import MlpJob
from .corpus import DataError


@dataclass(frozen=True)
class Augment:
    """Random distortions of images, drawn anew for each sample of each epoch; all in one bilinear pass.

    Args:
        shift: pixels, up to, in each direction.
        rotate: degrees, up to, either way.
        scale: share by which an image grows or shrinks, up to.
        elastic: pixels: standard deviation of a smooth random displacement (after Simard et al. 2003; here cubic
            B-splines over a grid of 4 x 4 cells).
        fill: the stored value beyond an image's edge.
    """

    shift: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    elastic: float = 0.0
    fill: float = 0.0

    def __post_init__(self) -> None:
        for name in ("shift", "rotate", "scale", "elastic"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"Augment: {name} must be 0 or more, got {value}")
        if self.scale >= 1:
            raise ValueError(f"Augment: scale must be below 1, got {self.scale}")

    def times(self, strength: float) -> "Augment":
        """The same distortions, weaker or stronger."""
        shift, rotate, scale, elastic = (strength * a for a in (self.shift, self.rotate, self.scale, self.elastic))
        return Augment(shift, rotate, scale, elastic, self.fill)

    @property
    def is_nothing(self) -> bool:
        return not (self.shift or self.rotate or self.scale or self.elastic)


class ArrayLoader:
    """Batches (inputs, targets) of arrays in memory; takes the place of a torch.utils.data.DataLoader over them.

    Iterating yields inputs [batch, *shape of a sample] in float32, normalised: (stored / top - mean) / std with top 255
    for bytes and 1 for floats. Shuffled, the order is the one a DataLoader would take at the same state of torch's
    generator. An MLPTrainer reads the stored numbers itself, batch by batch.

    Args:
        x: [N, ...], uint8 or float32; images are [N, channels, height, width].
        y: targets: [N] int64 classes, or [N] or [N, outputs] float32.
        mean, std: one number, or one for each channel (of [N, channels, ...] x).
        augment: distort images; `loader.augment` may be set anew between epochs. None: leave them as they are.

    Raises:
        DataError: arrays that are empty or do not fit together.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        batch_size: int = 64,
        shuffle: bool = False,
        drop_last: bool = False,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        augment: Augment | None = None,
    ):
        if x.dtype not in (torch.uint8, torch.float32) or x.device.type != "cpu":
            raise DataError(f"samples must be uint8 or float32 on the CPU, got {x.dtype} on {x.device}")
        if x.dim() < 2 or x.numel() == 0:
            raise DataError(f"samples must be [N, ...] and not empty, got {list(x.shape)}")
        if len(y) != len(x):
            raise DataError(f"there are {len(x)} samples, but {len(y)} targets")
        if y.dtype not in (torch.int64, torch.float32):
            raise DataError(f"targets must be int64 classes or float32 values, got {y.dtype}")
        if batch_size < 1:
            raise DataError(f"batch_size must be 1 or more, got {batch_size}")
        if drop_last and len(x) < batch_size:
            raise DataError(f"drop_last leaves nothing: {len(x)} samples are less than one batch of {batch_size}")
        self.x, self.y = x.contiguous(), y.contiguous()
        self.batch_size, self.shuffle, self.drop_last, self.augment = batch_size, shuffle, drop_last, augment
        self.scale, self.offset = self._affine(mean, std)

    def _affine(self, mean: float | Sequence[float], std: float | Sequence[float]) -> tuple[Tensor, Tensor]:
        """Factor and summand [features] that normalise what is stored."""
        channels, inner = self.x.shape[1], self.x[0, 0].numel()
        top = 255.0 if self.x.dtype is torch.uint8 else 1.0
        columns = []
        for name, value in (("mean", mean), ("std", std)):
            column = torch.tensor(value, dtype=torch.float64).reshape(-1)
            if len(column) not in (1, channels):
                raise DataError(f"{name} must be one number or {channels}, one for each channel, got {len(column)}")
            columns.append(column.expand(channels).repeat_interleave(inner))
        if not bool((columns[1] > 0).all()):
            raise DataError(f"std must be more than 0, got {std}")
        return (1 / (columns[1] * top)).float(), (-columns[0] / columns[1]).float()

    def __len__(self) -> int:
        n = len(self.x)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    @property
    def features(self) -> int:
        return self.x[0].numel()

    def order(self) -> Tensor:
        """The samples of the epoch that begins now, [len(self) batches' worth] int64."""
        n = len(self.x)
        order = torch.arange(n)
        if self.shuffle:  # a DataLoader draws twice: a seed for its workers, and one for its order
            seed = [int(torch.empty((), dtype=torch.int64).random_().item()) for _ in range(2)][1]
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        return order[: len(self) * self.batch_size]

    def draw_seed(self) -> int:
        """The seed of an epoch's distortions, from torch's generator; 0, and nothing drawn, where there are none."""
        return 0 if self._augment is None else int(torch.randint(2**62, ()).item())

    @property
    def _augment(self) -> Augment | None:
        return None if self.augment is None or self.augment.is_nothing else self.augment

    def fill_job(self, job: MlpJob, order: Tensor, seed: int, first_step: int) -> None:
        """Tells a native job where the samples `order` are, which begins with step `first_step` of the epoch."""
        if order.dtype is not torch.int64 or not order.is_contiguous():
            raise TypeError(f"order must be contiguous int64, got {order.dtype}")
        classes = self.y.dtype is torch.int64
        job.set_data(
            self.x.data_ptr(),
            self.x.dtype is torch.uint8,
            self.features,
            self.scale.data_ptr(),
            self.offset.data_ptr(),
            self.y.data_ptr() if classes else 0,
            0 if classes else self.y.data_ptr(),
            order.data_ptr(),
            len(order),
            self.batch_size,
        )
        job.set_random(seed, first_step)
        if (a := self._augment) is not None:
            if self.x.dim() != 4:
                raise DataError(f"augment needs images [N, channels, height, width], got {list(self.x.shape)}")
            job.set_augmentation(*self.x.shape[1:], a.shift, a.rotate, a.scale, a.elastic, a.fill)

    def inputs(self, order: Tensor, seed: int = 0, first_step: int = 0) -> Tensor:
        """Samples as the network sees them, float32 [len(order), *shape of a sample]."""
        if len(order) and not 0 <= int(order.min()) <= int(order.max()) < len(self.x):
            raise IndexError(f"order must hold samples in [0, {len(self.x)})")
        out = torch.empty(len(order), *self.x.shape[1:])
        job = MlpJob()
        self.fill_job(job, order, seed, first_step)
        job.input(out.data_ptr())
        return out

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order, seed = self.order(), self.draw_seed()
        for step, batch in enumerate(order.split(self.batch_size)):
            yield self.inputs(batch, seed, step), self.y[batch]

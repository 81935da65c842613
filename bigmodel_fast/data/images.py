"""Labelled images in memory: IDX files, folders of pictures, torchvision datasets, NumPy arrays, scikit-learn's digits.

A picture's numbers stay as they are stored (bytes, mostly); loaders normalise them batch by batch.
"""

import contextlib
import gzip
import math
import zipfile
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arrays import ArrayLoader, Augment
from .corpus import DataError

_IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".ppm", ".tif", ".tiff", ".webp"}
_PICTURE_PIXELS = 1 << 25
_DEFLATE = 1032  # bytes that one byte of a gzip can stand for at most
_BOMB_BYTES, _BOMB_RATIO = 64 << 20, 100  # what unpacks to more, and by more than this factor, is refused
_SPLITS = {"train": ("train", "training"), "test": ("t10k", "test", "val", "valid", "validation")}
_TEST_SHARE = 5  # of a source without splits, every fifth image (of a fixed shuffle) is one to test with


@dataclass(frozen=True)
class Images(torch.utils.data.Dataset):
    """Images and their classes; a Dataset of (image, class) whose images are float32, normalised.

    Args:
        pixels: [N, channels, height, width], uint8 or float32.
        labels: [N], int64, in [0, len(classes)).
        classes: their names. Empty: "0", "1", ... up to the largest label.
        mean, std: what normalises pixels as shares of white: one number, or one for each channel. The default brings
            them to [-1, 1].

    Raises:
        DataError: pixels and labels that do not fit together, or a label out of range.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    source: str = field(default="images", compare=False)

    def __post_init__(self) -> None:
        if self.pixels.dim() != 4 or self.pixels.numel() == 0:
            raise DataError(
                f"{self.source}: pixels must be [N, channels, height, width], got {list(self.pixels.shape)}"
            )
        if self.labels.dtype is not torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise DataError(
                f"{self.source}: {len(self.pixels)} images need as many int64 labels, "
                f"got {str(self.labels.dtype).removeprefix('torch.')}{list(self.labels.shape)}"
            )
        if not self.classes:
            object.__setattr__(self, "classes", tuple(str(i) for i in range(max(0, int(self.labels.max())) + 1)))
        bad = ((self.labels < 0) | (self.labels >= len(self.classes))).nonzero()
        if len(bad):
            at = int(bad[0])
            raise DataError(
                f"{self.source}: label {int(self.labels[at])} of image {at} is out of range: there are "
                f"{len(self.classes)} classes, numbered from 0"
            )

    # ---- where they come from ----

    @classmethod
    def load(cls, source: Any = None, split: str = "train", *, size: int | None = None) -> "Images":
        """Images from whatever `source` is.

        Args:
            source: None: scikit-learn's 1,797 handwritten digits, 8 x 8. A path: an IDX file of images (its labels
                beside it), a folder of IDX files, a folder with a folder of pictures for each class, or an .npz file
                with images and labels. A torchvision dataset. A pair of arrays (images, labels).
            split: "train", "test" or "all". Sources that know no splits give every fifth image to "test".
            size: pictures of a folder are brought to size x size pixels. None: they must be of one size.

        Raises:
            DataError: there is nothing, or it is damaged or mixed; one line says which and why.
        """
        if split not in (*_SPLITS, "all"):
            raise DataError(f"split must be train, test or all, got {split!r}")
        if source is None:
            return _digits()._part(split)
        if isinstance(source, cls):
            return source
        if isinstance(source, tuple | list) and len(source) == 2:
            return cls.from_arrays(*source)
        if hasattr(source, "__getitem__") and hasattr(source, "__len__") and not isinstance(source, str):
            return _from_torchvision(source)
        path = Path(source).expanduser()
        if not path.exists():
            raise DataError(f"--data {path}: no such file or folder")
        if path.suffix == ".npz":
            return cls.from_arrays(*_read_npz(path), source=str(path))._part(split)
        if path.is_file():
            return _from_idx(path, _labels_beside(path))
        return _from_folder(path, split, size)

    @classmethod
    def from_arrays(cls, pixels: Any, labels: Any, *, source: str = "images", **how: Any) -> "Images":
        """From arrays: [N, H, W], [N, H, W, 1 or 3] or [N, 1 or 3, H, W], and [N] whole numbers."""
        stored = torch.as_tensor(np.ascontiguousarray(pixels))
        if stored.dim() == 3:
            stored = stored.unsqueeze(1)
        elif stored.dim() == 4 and stored.shape[1] not in (1, 3) and stored.shape[3] in (1, 3):
            stored = stored.permute(0, 3, 1, 2)
        if stored.dtype is not torch.uint8:
            stored = stored.float()
        numbers = np.asarray(labels)
        if numbers.dtype.kind not in "iu":
            raise DataError(f"{source}: labels must be whole numbers, got {numbers.dtype}")
        return cls(stored.contiguous(), torch.from_numpy(numbers.astype(np.int64)), source=source, **how)

    # ---- what they are used as ----

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        loader = self.loader(1)
        return loader.inputs(torch.tensor([range(len(self))[index]]))[0], int(self.labels[index])

    def loader(self, batch_size: int, **how: Any) -> "ImageLoader":
        """Batches of them; `how` is ImageLoader's."""
        return ImageLoader(self, batch_size, **how)

    def _part(self, split: str) -> "Images":
        if split == "all":
            return self
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(self)))
        keep = (torch.arange(len(self)) % _TEST_SHARE == 0) == (split == "test")
        if not bool(keep.any()):
            raise DataError(f"{self.source}: {len(self)} images are too few to keep some for split {split!r}")
        chosen = order[keep].sort().values
        return Images(self.pixels[chosen], self.labels[chosen], self.classes, self.mean, self.std, self.source)


class ImageLoader(ArrayLoader):
    """In place of torch.utils.data.DataLoader(dataset, batch_size, shuffle), for datasets whose images fit in memory.

    Args:
        dataset: anything Images.load takes; a torchvision dataset's ToTensor and Normalize are applied batch by batch.
        augment: distort images; see Augment.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int = 1,
        shuffle: bool = False,
        *,
        drop_last: bool = False,
        augment: Augment | None = None,
    ):
        self.images = Images.load(dataset)
        super().__init__(
            self.images.pixels,
            self.images.labels,
            batch_size=batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            mean=self.images.mean,
            std=self.images.std,
            augment=augment,
        )


def _digits() -> Images:
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return Images.from_arrays(pixels, found.target, source="scikit-learn's digits")


# ---- IDX files ----


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file (LeCun et al. 1998), gzipped or not.

    Raises:
        DataError: it is truncated, longer than its header says, or no IDX file.
    """
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            with gzip.GzipFile(fileobj=raw) if packed else contextlib.nullcontext(raw) as f:
                return _read_idx(path, f, path.stat().st_size, packed)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: damaged or truncated gzip ({error}); get the file again") from None


def _read_idx(path: Path, f: Any, stored: int, packed: bool) -> np.ndarray:
    start = f.read(4)
    if len(start) < 4 or start[:2] != b"\0\0" or start[2] not in _IDX_TYPES:
        raise DataError(f"{path}: no IDX file (it begins with {start.hex(' ') or 'nothing'})")
    dtype, dims = np.dtype(_IDX_TYPES[start[2]]), start[3]
    sizes = f.read(4 * dims)
    if len(sizes) < 4 * dims:
        raise DataError(f"{path}: truncated in its header; get the file again")
    shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
    expected = math.prod(shape) * dtype.itemsize
    says = f"{'x'.join(map(str, shape))} numbers take {expected} bytes"
    if not packed and (there := stored - 4 - 4 * dims) != expected:
        raise DataError(f"{path}: {'truncated' if there < expected else 'too long'}: {says}, there are {there}")
    if packed and expected > _DEFLATE * stored:
        raise DataError(f"{path}: truncated: {says}, which no gzip of {stored} bytes can hold")
    _check_expansion(path, expected, stored)
    data = bytearray(f.read(expected + 1))
    if len(data) != expected:
        state = f"truncated: {says}, there are {len(data)}" if len(data) < expected else f"too long: {says}"
        raise DataError(f"{path}: {state}")
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _check_expansion(path: Path, unpacked: int, stored: int) -> None:
    """DataError for what would fill the memory from next to nothing, as no pictures do."""
    if unpacked > _BOMB_BYTES and unpacked > _BOMB_RATIO * stored:
        raise DataError(f"{path}: {stored} bytes unpack to {unpacked}; if that is meant, unpack it yourself")


def _read_npz(path: Path) -> list[np.ndarray]:
    """Images and labels of an .npz file, after the sizes it claims were compared with those it has."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
            names = [next((n for n in pair if n in members), None) for pair in (("images", "x"), ("labels", "y"))]
            if None in names:
                raise DataError(f"{path}: needs arrays images (or x) and labels (or y), has {', '.join(members)}")
            for name in map(str, names):
                member = members[name]
                _check_expansion(path, member.file_size, member.compress_size)
                with archive.open(member) as f:
                    version = np.lib.format.read_magic(f)
                    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
                    shape, _, dtype = (read or np.lib.format.read_array_header_2_0)(f)
                if dtype.hasobject:
                    raise DataError(f"{path}: {name} holds Python objects, which may be code; store numbers")
                if math.prod(shape) * dtype.itemsize > member.file_size:
                    raise DataError(f"{path}: {name} is truncated: it should be {list(shape)} of {dtype}")
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[str(name)] for name in names]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: not a readable .npz file ({' '.join(str(error).split())[:200]})") from None


def _from_idx(images: Path, labels: Path) -> Images:
    pixels, numbers = read_idx(images), read_idx(labels)
    if pixels.ndim not in (3, 4):
        raise DataError(f"{images}: images must have 3 or 4 dimensions, got {pixels.ndim}")
    if len(pixels) != len(numbers):
        raise DataError(f"{images}: {len(pixels)} images, but {len(numbers)} labels in {labels.name}")
    return Images.from_arrays(pixels, numbers, source=str(images))


def _labels_beside(images: Path) -> Path:
    stem = images.name.removesuffix(".gz").replace("images-idx3", "labels-idx1").replace("images-idx4", "labels-idx1")
    for name in (stem, stem + ".gz"):
        if name != images.name and (images.parent / name).is_file():
            return images.parent / name
    raise DataError(f"{images}: no labels beside it; they should be in {stem} or {stem}.gz")


# ---- folders ----


def _from_folder(root: Path, split: str, size: int | None) -> Images:
    idx = sorted(f for f in root.rglob("*images*idx?*") if f.is_file())
    if idx:
        parts = {s: [f for f in idx if f.name.startswith(words)] for s, words in _SPLITS.items()}
        if split == "all" or not any(parts.values()):
            chosen = idx[:1] if not any(parts.values()) else [fs[0] for fs in parts.values() if fs]
        else:
            chosen = parts[split][:1]
        if not chosen:
            raise DataError(
                f"{root}: no IDX file of images for split {split!r}; there are {', '.join(f.name for f in idx)}"
            )
        found = [_from_idx(f, _labels_beside(f)) for f in chosen]
        if len(found) == 1:
            return found[0] if any(parts.values()) else found[0]._part(split)
        return Images(torch.cat([f.pixels for f in found]), torch.cat([f.labels for f in found]), source=str(root))
    folders = {f.name: f for f in sorted(root.iterdir()) if f.is_dir() and not f.name.startswith(".")}
    for name, words in _SPLITS.items():
        inside = next((folders[w] for w in words if w in folders), None)
        if inside is not None and name == split:
            return _from_pictures(inside, size)
    if any(w in folders for words in _SPLITS.values() for w in words):
        raise DataError(f"{root}: no folder for split {split!r}; there are {', '.join(folders)}")
    return _from_pictures(root, size)._part(split)


def _from_pictures(root: Path, size: int | None) -> Images:
    """A folder with a folder for each class, as torchvision's ImageFolder has them."""
    from PIL import Image, UnidentifiedImageError

    classes = sorted(f.name for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    files = [
        (f, label)
        for label, name in enumerate(classes)
        for f in sorted((root / name).rglob("*"))
        if f.suffix.lower() in _PICTURES and not f.name.startswith(".")
    ]
    if not files:
        raise DataError(f"{root}: no pictures in it; it should hold a folder of pictures for each class")
    used = {label for _, label in files}
    if len(used) < len(classes):
        empty = next(name for label, name in enumerate(classes) if label not in used)
        raise DataError(f"{root}: the folder of class {empty!r} has no pictures; fill or remove it")
    pictures: list[Any] = []
    for file, _ in files:
        try:
            with Image.open(file) as opened:
                if opened.width * opened.height > _PICTURE_PIXELS:
                    raise DataError(
                        f"{file}: {opened.width}x{opened.height} pixels are more than {_PICTURE_PIXELS}; shrink it"
                    )
                opened.load()
                picture = opened.resize((size, size), Image.Resampling.BILINEAR) if size else opened.copy()
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{file}: not a readable picture ({error})") from None
        if picture.size != (pictures[0].size if pictures else picture.size):
            raise DataError(
                f"{root}: pictures of mixed sizes: {files[0][0].name} is {pictures[0].width}x{pictures[0].height}, "
                f"{file.name} is {picture.width}x{picture.height}; give a size to bring them to"
            )
        pictures.append(picture)
    mode = "L" if all(p.mode in ("L", "1", "LA", "I;16") for p in pictures) else "RGB"
    pixels = np.stack([np.asarray(p.convert(mode)) for p in pictures])
    return Images.from_arrays(pixels, [label for _, label in files], classes=tuple(classes), source=str(root))


# ---- torchvision ----


def _from_torchvision(dataset: Any) -> Images:
    """A dataset that keeps its images in memory (MNIST's family, CIFAR, SVHN), or whose items are pictures."""
    name = type(dataset).__name__
    mean, std = _normalisation(getattr(dataset, "transform", None), name)
    how: dict[str, Any] = {"mean": mean, "std": std, "source": name}
    if getattr(dataset, "classes", None):
        how["classes"] = tuple(map(str, dataset.classes))
    labels = next((v for n in ("targets", "labels") if (v := getattr(dataset, n, None)) is not None), None)
    stored = getattr(dataset, "data", None)
    if isinstance(stored, Tensor | np.ndarray) and labels is not None:
        return Images.from_arrays(stored, labels, **how)
    if not hasattr(dataset, "loader") or not hasattr(dataset, "samples"):
        raise DataError(f"{name}: knows neither data and targets nor samples; give arrays (images, labels) instead")
    pictures = [np.asarray(dataset.loader(path)) for path, _ in dataset.samples]
    if len({p.shape for p in pictures}) != 1:
        raise DataError(f"{name}: pictures of mixed sizes; load the folder itself, with a size to bring them to")
    return Images.from_arrays(np.stack(pictures), [label for _, label in dataset.samples], **how)


def _normalisation(transform: Any, name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std that ToTensor and Normalize, alone or in a Compose, amount to."""
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    steps = getattr(transform, "transforms", [transform] if transform is not None else [])
    for step in steps:
        kind = type(step).__name__
        if kind == "Normalize":
            mean, std = (tuple(float(v) for v in values) for values in (step.mean, step.std))
        elif kind == "ToDtype" and not getattr(step, "scale", False):
            raise DataError(f"{name}: transform ToDtype without scale=True is not supported; leave the transform out")
        elif kind not in ("ToTensor", "PILToTensor", "ToImage", "ConvertImageDtype", "ToDtype"):
            raise DataError(
                f"{name}: transform {kind} is not supported (ToTensor and Normalize are); "
                "leave it out, and use augment= for random distortions"
            )
    return mean, std

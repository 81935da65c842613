"""Images: IDX files, folders, arrays, torchvision's datasets; what is damaged or mixed is one line."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from bigmodel_fast.data import ArrayLoader, Augment, DataError, Images, read_idx


def write_idx(path: Path, array: np.ndarray, *, zipped: bool = False, cut: int = 0) -> None:
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    data = data[: len(data) - cut]
    path.write_bytes(gzip.compress(data) if zipped else data)


@pytest.fixture
def arrays() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    return draw.integers(256, size=(20, 5, 7), dtype=np.uint8), draw.integers(3, size=20, dtype=np.uint8)


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_with_their_splits(tmp_path: Path, arrays, zipped: bool) -> None:
    pixels, labels = arrays
    end = ".gz" if zipped else ""
    for name, part in (("train", slice(0, 15)), ("t10k", slice(15, 20))):
        write_idx(tmp_path / f"{name}-images-idx3-ubyte{end}", pixels[part], zipped=zipped)
        write_idx(tmp_path / f"{name}-labels-idx1-ubyte{end}", labels[part], zipped=zipped)
    train, test, both = (Images.load(tmp_path, split) for split in ("train", "test", "all"))
    assert np.array_equal(train.pixels[:, 0].numpy(), pixels[:15])
    assert np.array_equal(test.labels.numpy(), labels[15:])
    assert len(both) == 20
    one = Images.load(tmp_path / f"t10k-images-idx3-ubyte{end}")
    assert torch.equal(one.pixels, test.pixels)
    image, label = test[1]
    assert label == labels[16]
    torch.testing.assert_close(image[0], (torch.from_numpy(pixels[16]) / 255 - 0.5) / 0.5)


def test_a_damaged_idx_file_is_one_line(tmp_path: Path, arrays) -> None:
    pixels, labels = arrays
    images, marks = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"

    def complaint() -> str:
        with pytest.raises(DataError) as caught:
            Images.load(tmp_path)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)
        return str(caught.value)

    write_idx(images, pixels)
    assert "no labels beside it" in complaint()
    write_idx(marks, labels)
    assert len(Images.load(tmp_path)) == 20
    write_idx(marks, labels[:19])
    assert "20 images, but 19 labels" in complaint()
    write_idx(marks, labels)
    write_idx(images, pixels, cut=3)
    assert "truncated: 20x5x7 numbers take 700 bytes, there are 697" in complaint()
    images.write_bytes(images.read_bytes()[:9])
    assert "truncated in its header" in complaint()
    images.write_bytes(b"\x89PNG....")
    assert "no IDX file (it begins with 89 50 4e 47)" in complaint()
    write_idx(images, pixels, zipped=True)
    images.write_bytes(images.read_bytes()[:-20])
    assert "damaged or truncated gzip" in complaint()


def test_idx_of_other_types(tmp_path: Path) -> None:
    array = np.array([[1.5, -2.0]], ">f4")
    (tmp_path / "a").write_bytes(bytes([0, 0, 13, 2]) + struct.pack(">2I", 1, 2) + array.tobytes())
    found = read_idx(tmp_path / "a")
    assert found.dtype == np.float32
    assert found.tolist() == [[1.5, -2.0]]


def test_the_digits_are_split_without_overlap() -> None:
    pytest.importorskip("sklearn")
    train, test, both = (Images.load(split=split) for split in ("train", "test", "all"))
    assert (len(train), len(test), len(both)) == (1437, 360, 1797)
    assert train.pixels.shape[1:] == (1, 8, 8)
    assert int(both.pixels.max()) == 255
    assert len(both.classes) == 10
    assert len({p.numpy().tobytes() for p in train.pixels} & {p.numpy().tobytes() for p in test.pixels}) == 0
    with pytest.raises(DataError, match="split must be train, test or all, got 'dev'"):
        Images.load(split="dev")


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(DataError, match="no such file or folder"):
        Images.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no pictures in it; it should hold a folder of pictures for each class"):
        Images.load(tmp_path)
    for name, grey in (("black", 0), ("white", 255)):
        (tmp_path / name).mkdir()
        for i in range(5):
            image.new("L", (4, 6), grey).save(tmp_path / name / f"{i}.png")
    found = Images.load(tmp_path, "all")
    assert (found.classes, found.pixels.shape) == (("black", "white"), (10, 1, 6, 4))
    assert torch.equal(found.pixels.flatten(1).float().mean(1), found.labels * 255.0)
    assert len(Images.load(tmp_path)) + len(Images.load(tmp_path, "test")) == 10
    (tmp_path / "grey").mkdir()
    with pytest.raises(DataError, match="the folder of class 'grey' has no pictures; fill or remove it"):
        Images.load(tmp_path)
    image.new("RGB", (5, 6), "red").save(tmp_path / "grey" / "red.png")
    with pytest.raises(DataError, match=r"mixed sizes: 0\.png is 4x6, red\.png is 5x6; give a size"):
        Images.load(tmp_path)
    assert Images.load(tmp_path, "all", size=3).pixels.shape == (11, 3, 3, 3)
    (tmp_path / "grey" / "red.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"red\.png: not a readable picture"):
        Images.load(tmp_path)


def test_folders_of_splits(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for split, count in (("train", 3), ("val", 2)):
        (tmp_path / split / "a").mkdir(parents=True)
        for i in range(count):
            image.new("L", (2, 2)).save(tmp_path / split / "a" / f"{i}.png")
    assert [len(Images.load(tmp_path, s)) for s in ("train", "test")] == [3, 2]


def test_arrays_of_every_layout(tmp_path: Path, arrays) -> None:
    pixels, labels = arrays
    grey = Images.from_arrays(pixels, labels)
    colour = Images.load((np.stack([pixels] * 3, axis=-1), labels.tolist()))
    assert grey.pixels.shape == (20, 1, 5, 7)
    assert colour.pixels.shape == (20, 3, 5, 7)
    assert torch.equal(colour.pixels[:, 1:2], grey.pixels)
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels)
    assert torch.equal(Images.load(tmp_path / "a.npz", "all").pixels, grey.pixels)
    floats = Images.from_arrays(pixels.astype(np.float64) / 255, labels)
    torch.testing.assert_close(floats[3][0], grey[3][0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p, n: Images.from_arrays(p, n, classes=("a", "b")), "label 2 of image .* is out of range: there are 2"),
        (lambda p, n: Images.from_arrays(p, n.astype(int) - 1), "label -1 of image .* is out of range"),
        (lambda p, n: Images.from_arrays(p, n[:3]), r"20 images need as many int64 labels, got int64\[3\]"),
        (lambda p, n: Images.from_arrays(p, n / 2), "labels must be whole numbers, got float64"),
        (lambda p, n: Images.from_arrays(p[:0], n[:0]), "pixels must be"),
        (lambda p, n: Images.from_arrays(p, n, mean=(0.5, 0.5)).loader(4), "mean must be one number or 1"),
        (lambda p, n: Images.from_arrays(p, n, std=(0.0,)).loader(4), "std must be more than 0"),
        (lambda p, n: Images.from_arrays(p, n).loader(0), "batch_size must be 1 or more"),
        (lambda p, n: Images.from_arrays(p, n).loader(21, drop_last=True), "drop_last leaves nothing"),
    ],
)
def test_arrays_that_do_not_fit_are_one_line(arrays, make, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        make(*arrays)
    assert "\n" not in str(caught.value)


def test_torchvision_datasets_bring_their_normalisation(tmp_path: Path, arrays) -> None:
    torchvision = pytest.importorskip("torchvision", exc_type=ImportError)
    transforms = torchvision.transforms
    pixels, labels = arrays
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train", "t10k"):
        write_idx(raw / f"{name}-images-idx3-ubyte", np.resize(pixels, (20, 28, 28)))
        write_idx(raw / f"{name}-labels-idx1-ubyte", labels)
    both = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    dataset = torchvision.datasets.MNIST(tmp_path, transform=both)
    found = Images.load(dataset)
    assert len(found.classes) == 10
    for i in (0, 7):
        torch.testing.assert_close(found[i][0], dataset[i][0], rtol=1e-5, atol=1e-6)
        assert found[i][1] == dataset[i][1]
    dataset.transform = transforms.Compose([transforms.RandomRotation(5), transforms.ToTensor()])
    with pytest.raises(DataError, match="transform RandomRotation is not supported"):
        Images.load(dataset)


def test_pictures_of_several_channels_move_together(arrays) -> None:
    pixels, labels = arrays
    colour = Images.from_arrays(np.stack([pixels] * 3, axis=1), labels)
    seen = next(iter(colour.loader(20, augment=Augment(rotate=20, elastic=1))))[0]
    assert torch.equal(seen[:, 0], seen[:, 2])
    with pytest.raises(DataError, match=r"augment needs images \[N, channels, height, width\]"):
        next(iter(ArrayLoader(torch.ones(3, 4), torch.ones(3).long(), augment=Augment(shift=1))))
    with pytest.raises(ValueError, match="Augment: shift must be 0 or more, got -1"):
        Augment(shift=-1)

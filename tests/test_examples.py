"""The examples run: on scikit-learn's digits in MNIST's files, and on MNIST itself where it is at hand."""

import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from bigmodel_fast.data import Images

ROOT = Path(__file__).parents[1]
MNIST = ROOT.parent / "shared" / "data" / "mnist"
pytestmark = pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="needs the source tree")


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits as 28 x 28 images in MNIST's four files."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("digits")
    for name, split in (("train", "train"), ("t10k", "test")):
        images = Images.load(split=split)
        pixels = np.pad(images.pixels[:, 0].numpy().repeat(3, 1).repeat(3, 2), ((0, 0), (2, 2), (2, 2)))
        for kind, array in (("images-idx3", pixels), ("labels-idx1", images.labels.numpy().astype(np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (folder / f"{name}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return folder


def test_two_changed_lines_give_the_same_network(digits: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchvision", exc_type=ImportError)
    handwriting = example("handwriting")
    source = (ROOT / "examples" / "handwriting.py").read_text()
    assert source.count("# changed") == 2
    handwriting.mnist_root(digits, tmp_path)
    plain, fast = (run(str(tmp_path), 3, 0) for run in (handwriting.plain, handwriting.fast))
    assert plain["accuracy"] > 0.3
    assert fast["accuracy"] == pytest.approx(plain["accuracy"], abs=0.006)  # two of 360
    assert fast["epoch_s"] < plain["epoch_s"]
    shown = handwriting.table({"plain": [plain], "fast": [fast]})
    assert f"{plain['accuracy']:.2%}" in shown
    assert "times as fast" in shown


def test_handwriting_says_what_is_missing(tmp_path: Path) -> None:
    pytest.importorskip("torchvision", exc_type=ImportError)
    with pytest.raises(SystemExit, match="has no train-images-idx3-ubyte"):
        example("handwriting").main(["--data", str(tmp_path)])


def test_the_best_recipe_learns(digits: Path) -> None:
    best = example("handwriting_best")
    reached, _ = best.run(*(Images.load(digits, split) for split in ("train", "test")), seed=0)
    assert reached > 0.95


@pytest.mark.skipif(not MNIST.is_dir(), reason="MNIST is not at hand (../shared/data/mnist)")
def test_the_best_recipe_on_mnist() -> None:
    best = example("handwriting_best")
    reached, seconds = best.run(*(Images.load(MNIST, split) for split in ("train", "test")), seed=0, epochs=2)
    assert reached > 0.965
    assert seconds < 10


def test_tabular_finds_the_malignant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    example("tabular").main(["--out", str(tmp_path / "roc.png")])
    figures = dict(zip((words := capsys.readouterr().out.split())[0:10:2], map(float, words[1:10:2]), strict=True))
    assert figures["recall"] > 0.92
    assert figures["f1"] > 0.94
    assert figures["auc"] > 0.98
    assert (tmp_path / "roc.png").read_bytes().startswith(b"\x89PNG")

"""The examples run: on scikit-learn's digits in MNIST's files, and on MNIST itself where it is at hand."""

import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

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


# ---- translation ----


@pytest.fixture
def translating(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example with a recipe of a tiny model, and a folder of pairs `tmp_path`/pairs."""
    for package in ("yaml", "safetensors", "matplotlib", "tokenizers", "rich"):
        pytest.importorskip(package)
    import yaml

    translate = example("translate")
    recipe = yaml.safe_load(translate.RECIPE.read_text())
    recipe["model"] |= {"layers": 1, "heads": 2, "width": 32, "mlp_width": 64}
    recipe |= {"steps": 4, "vocab_size": 300, "cache": str(tmp_path / "cache"), "out": str(tmp_path / "run")}
    recipe["optim"]["batch"] = 8
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(translate, "RECIPE", tmp_path / "recipe.yaml")
    (tmp_path / "pairs").mkdir()
    for split in ("train", "val", "test"):
        for language, words in (("en", "a man and a dog"), ("de", "ein Mann und ein Hund")):
            lines = [f"{words} {i}" for i in range(80 if split == "train" else 8)]
            (tmp_path / "pairs" / f"{split}.{language}").write_text("\n".join(lines) + "\n")
    return translate


def test_translation_is_learnt_and_measured(translating: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("sacrebleu")
    data = str(tmp_path / "pairs")
    monkeypatch.setattr(sys, "argv", ["translate.py", "--data", data, "--test", "test", "--beams", "2"])
    translating.main()
    shown = capsys.readouterr().out
    assert "\nstep 4: BLEU " in shown
    assert len((tmp_path / "run" / "test.de").read_text().splitlines()) == 8
    references = [f"ein Mann und ein Hund {i}" for i in range(8)]
    monkeypatch.setattr(translating, "translate_lines", lambda model, tokenizer, lines, **_: references)
    assert translating.bleu(None, None, references, references)["bleu"] == pytest.approx(100)


def test_torchs_transformer_learns_by_the_same_recipe(translating: ModuleType, tmp_path, monkeypatch, capsys) -> None:
    pytest.importorskip("sacrebleu")
    config = translating.recipe(data=str(tmp_path / "pairs"), steps=30)
    config.optim.warmup = 3
    model, _ = translating.train_plain(config)
    assert not model.training
    objective = translating.make_objective(config)
    torch.manual_seed(config.seed)
    batch = objective.validation()[0]
    with torch.no_grad():
        before, after = (float(objective.loss(m.eval(), *batch)) for m in (objective.build(), model))
    assert after < before - 1
    data = str(tmp_path / "pairs")
    monkeypatch.setattr(sys, "argv", ["translate.py", "--data", data, "--test", "test", "--plain", "--steps", "1"])
    translating.main()
    assert "torch.nn.Transformer, step 1: BLEU " in capsys.readouterr().out
    assert len((tmp_path / "run" / "test.de").read_text().splitlines()) == 8


def test_translation_is_timed_beside_torchs(translating: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["translate.py", "--data", str(tmp_path / "pairs"), "--compare", "2"])
    translating.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == [
        "bigmodel_fast",
        "nn.Transformer, padded",
        "nn.Transformer, bucketed",
    ]
    assert not (tmp_path / "run").exists()


def test_fine_tuning_beside_a_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    from tiny_models import tiny_bert, write_lines

    rows = [{"text": f"i saw a {('cat', 'dog')[i % 2]}", "label": i % 2} for i in range(40)]
    model = tiny_bert(tmp_path / "bert", [str(r["text"]) for r in rows])
    data = write_lines(tmp_path / "data.jsonl", rows)
    argv = ["example", "--model", model, "--data", data, "--steps", "2", "--batch", "4", "--max-length", "16"]
    monkeypatch.setattr(sys, "argv", argv)
    example("finetune_beside_stock").main()
    said = capsys.readouterr().out
    assert [line.partition("median")[0].strip() for line in said.splitlines()[1:]] == [
        "ours", "stock, shuffled", "stock, ours",
    ]  # fmt: skip

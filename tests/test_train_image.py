"""bigmodel-fast train-image: runs end to end, resumes with the same bits, refuses with one line."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch

for package in ("jsonargparse", "yaml", "safetensors", "matplotlib", "sklearn"):
    pytest.importorskip(package)

from safetensors.torch import load_file  # noqa: E402

from bigmodel_fast.cli import main  # noqa: E402
from bigmodel_fast.data import Images  # noqa: E402
from bigmodel_fast.models import MLP  # noqa: E402
from bigmodel_fast.train.classification import classify  # noqa: E402
from bigmodel_fast.train.image_config import Distortions, ImageTrainConfig, MLPShape, ViTShape  # noqa: E402
from bigmodel_fast.train.images import ImageTrainer  # noqa: E402
from bigmodel_fast.train.mlp import EpochResult  # noqa: E402


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["train-image", *argv]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_an_mlp_learns_the_digits_and_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert (
        main(["train-image", "--out", str(out), "--epochs", "12", "--augment.shift", "0.5", "--mlp.hidden", "[64]"])
        == 0
    )
    said = capsys.readouterr().out
    assert "1,437 images of 1x8x8" in said
    report = json.loads((out / "report.json").read_text())
    assert report["accuracy"] > 0.9
    assert len(report["classes"]) == 10
    assert sum(map(sum, report["confusion"])) == 360
    assert f"{report['accuracy']:.2%}" in said
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert lines[-1]["test_accuracy"] == pytest.approx(report["accuracy"])
    for picture in ("confusion.png", "mistakes.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    model = MLP([64, 64, 10])
    model.load_state_dict(load_file(out / "model.safetensors"))
    test = Images.load(split="test")
    right = torch.cat([(model(x).argmax(1) == y) for x, y in test.loader(100)]).float().mean().item()
    assert right == pytest.approx(report["accuracy"])


@pytest.mark.parametrize("model", ["mlp", "vit"])
@pytest.mark.parametrize("stop_at", [12, 7], ids=["an epoch's end", "mid-epoch"])
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(
    model: str, stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bigmodel_fast.train.mlp.CALL_SECONDS", 0.0)  # a step a call, to stop at any
    monkeypatch.setattr("bigmodel_fast.train.mlp.FIRST_CALL_FLOP", 0.0)
    options = {"epochs": 2, "dtype": "fp32", "model": model, "augment": Distortions(shift=1.0, fade=0)}
    options |= {"mlp": MLPShape(dropout=0.1), "vit": ViTShape(layers=1, width=48, dropout=0.1)}
    whole = ImageTrainer(ImageTrainConfig(out=str(tmp_path / "whole"), **options))
    assert whole.run()
    halved = ImageTrainer(ImageTrainConfig(out=str(tmp_path / "halved"), **options))
    went_on = halved._went_on

    def terminate(done: EpochResult) -> None:
        went_on(done)
        if halved.step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    halved._went_on = terminate
    assert not halved.run()
    assert halved.step == stop_at
    torch.manual_seed(99)
    again = ImageTrainer(dataclasses.replace(halved.config, resume="auto"))
    assert again.step == stop_at
    assert again.run()
    for (name, p), q in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    lines = [
        [json.loads(line) | {"seconds": 0} for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "halved")
    ]
    assert lines[1] == [pytest.approx(line) for line in lines[0]]


def test_a_run_that_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ImageTrainConfig(out=str(tmp_path), epochs=1)
    trainer = ImageTrainer(config)
    assert "is in use by process" in refused(["--out", str(tmp_path)], capsys)
    assert trainer.run()
    again = ["--config", str(tmp_path / "config.yaml")]
    assert "holds a run already; go on with --resume auto" in refused(again, capsys)
    assert "of another run (batch is 128 there and 7 here)" in refused(
        [*again, "--resume", "auto", "--batch", "7"], capsys
    )
    assert main(["train-image", *again, "--resume", "auto", "--epochs", "2"]) == 0
    assert "resumed after step 12" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["vit", "torchvision/squeezenet1_1"])
def test_other_models_take_a_few_steps(model: str, tmp_path: Path) -> None:
    if model != "vit":
        pytest.importorskip("torchvision", exc_type=ImportError)
    image = pytest.importorskip("PIL.Image")
    for name, grey in (("black", 10), ("white", 240)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(20):
            image.new("L", (32, 32), grey + i % 10).save(tmp_path / "data" / name / f"{i}.png")
    config = ImageTrainConfig(
        data=str(tmp_path / "data"), model=model, out=str(tmp_path / "run"), epochs=4, batch=8, lr=1e-3
    )
    config.vit.layers, config.vit.patch, config.vit.width = 1, 8, 48
    ends = []
    trainer = ImageTrainer(config)
    assert trainer.run(ends.append)
    assert ends[-1].loss < ends[0].loss
    assert trainer.report()[0].classes[1].name == "white"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--data", "nowhere"], "--data nowhere: no such file or folder"),
        (["--model", "resnet"], "model must be mlp, vit or torchvision/NAME, got resnet"),
        (["--model", "torchvision/resnet5"], "torchvision has no classifier 'resnet5'"),
        (["--epochs", "0"], "epochs must be 1 or more, got 0"),
        (["--lr", "0"], "lr must be more than 0"),
        (["--mlp.activation", "swish"], "mlp.activation must be one of relu"),
        (["--mlp.dropout", "1"], "mlp.dropout must lie in [0, 1), got 1.0"),
        (["--augment.scale", "2"], "augment.scale must be below 1, got 2.0"),
        (["--model", "vit", "--vit.patch", "3"], "vit.image must be a multiple of patch, got 8 and 3"),
        (["--epoch", "3"], "epoch: no such key"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if "torchvision" in argv[1]:
        pytest.importorskip("torchvision", exc_type=ImportError)
    assert words in refused(["--out", str(tmp_path), *argv], capsys)


def test_the_figures_are_those_of_their_definitions() -> None:
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 2, 0])
    found = classify(predicted, labels, ("a", "b", "c", "d"))
    assert found.accuracy == pytest.approx(2 / 6)
    assert found.confusion[0] == (1, 2, 0, 0)
    a, _, c, d = found.classes
    assert (a.precision, a.recall, a.f1, a.samples) == pytest.approx((1 / 2, 1 / 3, 2 / 5, 3))
    assert (c.precision, c.recall, c.f1, d.f1) == (0.0, 0.0, 0.0, 0.0)
    assert "accuracy 33.33%" in str(found)

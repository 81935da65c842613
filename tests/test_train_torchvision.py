"""bigmodel-fast train-image on torchvision's classifiers: accelerated, resumed, judged, exported, and refused."""

import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

for package in ("jsonargparse", "yaml", "safetensors", "matplotlib", "sklearn"):
    pytest.importorskip(package)
torchvision = pytest.importorskip("torchvision", exc_type=ImportError)

from safetensors.torch import load_file  # noqa: E402

from bigmodel_fast.cli import main  # noqa: E402
from bigmodel_fast.train import ConfigError  # noqa: E402
from bigmodel_fast.train.image_config import ImageTrainConfig  # noqa: E402
from bigmodel_fast.train.images import ImageTrainer  # noqa: E402
from bigmodel_fast.train.mlp import EpochResult  # noqa: E402
from bigmodel_fast.train.torchvision_models import losses  # noqa: E402


@pytest.fixture
def configure(tmp_path: Path):
    """Settings for a few dark and bright images of size x size, in grey."""

    def make(size: int, images: int = 20, out: str = "run", **how: Any) -> ImageTrainConfig:
        labels = np.arange(images) % 2
        noise = np.random.default_rng(0).integers(0, 60, (images, size, size))
        np.savez(tmp_path / "data.npz", images=(noise + labels[:, None, None] * 150).astype(np.uint8), labels=labels)
        options = {"epochs": 1, "batch": 8, "lr": 1e-3, **how}
        return ImageTrainConfig(data=str(tmp_path / "data.npz"), out=str(tmp_path / out), **options)

    return make


def one_step(trainer: ImageTrainer) -> float:
    batch = torch.arange(min(trainer.config.batch, len(trainer.train)))
    trainer._saved = float("inf")  # no checkpoint of so many weights
    trainer.model.train()
    trainer._train_step(trainer.loader.inputs(batch, 0, 0), trainer.train.labels[batch], lambda: None)
    return trainer._done.loss


def test_resnet_18_is_trained_judged_and_exported(configure, capsys: pytest.CaptureFixture[str]) -> None:
    config = configure(16, model="torchvision/resnet18", epochs=4)
    argv = [f"--{name}={getattr(config, name)}" for name in ("data", "out", "model", "epochs", "batch", "lr")]
    assert main(["train-image", *argv]) == 0
    said = capsys.readouterr().out
    assert "accelerated: 1 Linear\n" in said
    out = Path(config.out)
    ends = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(ends) == 4
    assert ends[-1]["loss"] < 0.5 * ends[0]["loss"]
    model = torchvision.models.resnet18(num_classes=2)
    model.load_state_dict(load_file(out / "model.safetensors"))
    trainer = ImageTrainer(dataclasses.replace(config, resume="auto"))
    x, y = next(iter(trainer.test.loader(4)))
    right = (model.eval()(x.expand(-1, 3, -1, -1)).argmax(1) == y).float().mean().item()
    assert right == json.loads((out / "report.json").read_text())["accuracy"]


@pytest.mark.parametrize("stop_at", [2, 1], ids=["an epoch's end", "mid-epoch"])
def test_a_stopped_run_goes_on_with_the_same_bits(configure, stop_at: int) -> None:
    """With batch statistics, dropout and the accelerated classifier; mobilenet_v3_small has all three."""
    options = {"model": "torchvision/mobilenet_v3_small", "epochs": 2, "dtype": "fp32"}
    whole = ImageTrainer(configure(32, out="whole", **options))
    assert whole.run()
    halved = ImageTrainer(configure(32, out="halved", **options))
    went_on = halved._went_on

    def terminate(done: EpochResult) -> None:
        went_on(done)
        if halved.step == stop_at:
            signal.raise_signal(signal.SIGTERM)

    halved._went_on = terminate
    assert not halved.run()
    torch.manual_seed(99)
    again = ImageTrainer(dataclasses.replace(halved.config, resume="auto"))
    assert again.step == stop_at
    assert again.run()
    for (name, p), q in zip(whole.model.state_dict().items(), again.model.state_dict().values(), strict=True):
        assert torch.equal(p, q), name


def test_vit_b_16_takes_the_size_of_the_images(configure, tmp_path: Path) -> None:
    trainer = ImageTrainer(configure(32, 5, model="torchvision/vit_b_16", batch=4, dtype="bf16"))
    assert trainer.accelerated.line.startswith("accelerated: ")
    for part in ("12 MultiheadAttention", "12 MLPBlock", "25 LayerNorm"):
        assert part in trainer.accelerated.line
    assert trainer.model.image_size == 32
    first, last = one_step(trainer), None
    for _ in range(2):
        trainer._done = EpochResult(0, 1, 0.0, 0.0, 0.0)
        last = one_step(trainer)
    assert last < first
    from bigmodel_fast.train import checkpoint

    checkpoint.write_model(trainer.model, tmp_path / "model.safetensors")
    stock = torchvision.models.vit_b_16(num_classes=2, image_size=32)
    stock.load_state_dict(load_file(tmp_path / "model.safetensors"))
    trainer.dtype = "fp32"
    x = next(iter(trainer.test.loader(4)))[0].expand(-1, 3, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(trainer.predict(trainer.test), stock.eval()(x), rtol=1e-3, atol=1e-3)


def test_an_auxiliary_head_counts_less() -> None:
    """And not at all where it is switched off."""
    logits, labels = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 4, 1])
    each = [torch.nn.functional.cross_entropy(x, labels) for x in logits]
    loss, main = losses("torchvision/inception_v3", (logits[0], logits[1]), labels)
    assert torch.equal(main, logits[0])
    torch.testing.assert_close(loss, each[0] + 0.4 * each[1])
    torch.testing.assert_close(losses("torchvision/googlenet", tuple(logits), labels)[0], each[0] + 0.3 * sum(each[1:]))
    torch.testing.assert_close(losses("torchvision/googlenet", (logits[0], None, None), labels)[0], each[0])


@pytest.mark.slow
def test_inception_v3_learns_by_both_of_its_heads(configure) -> None:
    """At 299 x 299, the least its auxiliary head can take."""
    trainer = ImageTrainer(configure(299, 5, model="torchvision/inception_v3", batch=2))
    assert trainer.accelerated.line == "accelerated: 2 Linear, 1 Dropout"
    before = trainer.model.AuxLogits.fc.weight.detach().clone()
    one_step(trainer)
    assert not torch.equal(trainer.model.AuxLogits.fc.weight, before)
    assert trainer.predict(trainer.test).shape == (1, 2)


@pytest.mark.parametrize(
    ("size", "how", "words"),
    [
        (32, {"model": "torchvision/inception_v3"}, "size: inception_v3 cannot be trained on images of 32x32"),
        (30, {"model": "torchvision/vit_b_16"}, "size: vit_b_16 cannot be trained on images of 30x30"),
        (16, {"model": "torchvision/resnet18", "batch": 5}, "batch: resnet18 normalises over the batch"),
        (16, {"model": "torchvision/fcn_resnet50"}, "torchvision has no classifier 'fcn_resnet50'"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_run(configure, size: int, how: dict, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        ImageTrainer(configure(size, **how))
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)

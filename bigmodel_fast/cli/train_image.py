"""bigmodel-fast train-image: an image classifier from pictures, and a report on what it gets wrong."""

import shlex

from ..train.images import EpochEnd, ImageTrainConfig, ImageTrainer
from .arguments import parse

DESCRIPTION = """Trains a classifier on images: an MLP by the native engine, a ViT through this package's operators, or
one of torchvision's, accelerated where parts are known. Without options it learns scikit-learn's handwritten digits in
a second. Ctrl-C saves, and says how to go on."""


def run(argv: list[str]) -> int:
    """The command; returns its exit code."""
    config = ImageTrainConfig.from_dict(parse(argv, "train-image", ImageTrainConfig, DESCRIPTION))
    trainer = ImageTrainer(config)
    shape = "x".join(map(str, trainer.train.pixels.shape[1:]))
    print(
        f"{config.model} of {sum(p.numel() for p in trainer.model.parameters()):,} parameters, {trainer.dtype}; "
        f"{len(trainer.train):,} images of {shape} to train on, {len(trainer.test):,} to test, "
        f"{len(trainer.train.classes)} classes; in {config.out}"
        + (f", resumed after step {trainer.step}" if trainer.step else ""),
        flush=True,
    )
    if trainer.accelerated is not None:
        print(trainer.accelerated.line, flush=True)
    if not trainer.run(lambda end: print(describe(end), flush=True)):
        print(
            f"stopped after step {trainer.step}, in epoch {trainer.epoch + 1}; to go on: bigmodel-fast train-image "
            f"--config {shlex.quote(f'{config.out}/config.yaml')} --resume auto"
        )
        return 0
    report, missed = trainer.report()
    print(report)
    print(f"{missed} of {len(trainer.test)} missed")
    print(f"in {config.out}: model.safetensors, report.json, confusion.png, mistakes.png, metrics.jsonl")
    return 0


def describe(end: EpochEnd) -> str:
    """An epoch on one line."""
    return (
        f"epoch {end.epoch:3d}  loss {end.loss:.4f}  accuracy {end.accuracy:.2%}  "
        f"test loss {end.test_loss:.4f}  test accuracy {end.test_accuracy:.2%}  {end.seconds:.2f} s"
    )

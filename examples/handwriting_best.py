"""Handwritten digits as well as a 784-128-64-10 network learns them in 10 epochs: AdamW, one cycle, distorted images.

    python examples/handwriting_best.py --data FOLDER [--seeds 5]

FOLDER holds MNIST's four files, gzipped or not. Distortions fade out over the last epochs, so that the network ends on
images as they are.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from bigmodel_fast.data import Augment, DataError, Images
from bigmodel_fast.models import MLP
from bigmodel_fast.train import MLPTrainer

EPOCHS, BATCH, PEAK_LR, FADE = 10, 128, 4e-3, 3
DISTORTIONS = Augment(rotate=6, scale=0.06, shift=1, elastic=1)


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: Images) -> float:
    right = [(model(x).argmax(1) == y).float() for x, y in images.loader(1000)]
    return torch.cat(right).mean().item()


def run(train: Images, test: Images, seed: int, epochs: int = EPOCHS) -> tuple[float, float]:
    """Accuracy on the test set, and seconds of training."""
    torch.manual_seed(seed)
    model = MLP([784, 128, 64, 10])
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR)
    loader = train.loader(BATCH, shuffle=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=epochs * len(loader) + 1)
    trainer = MLPTrainer(model, "cross_entropy", optimizer)
    started = time.perf_counter()
    for epoch in range(epochs):
        loader.augment = DISTORTIONS.times(min(1.0, (epochs - 1 - epoch) / FADE))
        trainer.epoch(loader, scheduler=schedule)
    seconds = time.perf_counter() - started
    return accuracy(model, test), seconds


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="MNIST with distorted images and one cycle of AdamW.")
    parser.add_argument("--data", type=Path, required=True, help="folder with MNIST's four files")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args(argv)
    try:
        train, test = (Images.load(arguments.data, split) for split in ("train", "test"))
    except DataError as error:
        parser.error(str(error))
    found = []
    for seed in range(arguments.seeds):
        found.append(run(train, test, seed))
        print(f"seed {seed}: {found[-1][0]:.2%} of the test set, trained in {found[-1][1]:.2f} s")
    print(f"mean: {statistics.mean(a for a, _ in found):.3%}, {statistics.mean(s for _, s in found):.2f} s")


if __name__ == "__main__":
    main()

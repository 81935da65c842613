"""Handwritten digits: the script people write for MNIST, and the same script with two lines changed.

    python examples/handwriting.py --data FOLDER [--epochs 10] [--seeds 3] [--versions plain,fast]

FOLDER holds MNIST's four files, gzipped or not. `plain` and `fast` below differ in the two lines marked so. Each runs
in a process of its own; the table has the time of an epoch, the time from the data on disk to the accuracy on the test
set, that accuracy, and the most memory the process held.
"""

import argparse
import gzip
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision import datasets, transforms

NAMES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
TRANSFORM = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def train(model: nn.Module, loader: Any, loss_fn: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for images, labels in loader:
        optimizer.zero_grad()
        loss = loss_fn(model(images), labels)
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, loader: Any) -> float:
    right = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return torch.cat(right).mean().item()


def plain(root: str, epochs: int, seed: int) -> dict[str, float]:
    from torch.utils.data import DataLoader

    torch.manual_seed(seed)
    started = time.perf_counter()
    train_loader = DataLoader(datasets.MNIST(root, train=True, transform=TRANSFORM), 64, shuffle=True)
    test_loader = DataLoader(datasets.MNIST(root, train=False, transform=TRANSFORM), 1000)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    times = []
    for _ in range(epochs):
        began = time.perf_counter()
        train(model, train_loader, nn.CrossEntropyLoss(), optimizer)
        times.append(time.perf_counter() - began)
    return result(times, accuracy(model, test_loader), started)


def fast(root: str, epochs: int, seed: int) -> dict[str, float]:
    from bigmodel_fast.data import ImageLoader as DataLoader  # changed
    from bigmodel_fast.train import MLPTrainer

    torch.manual_seed(seed)
    started = time.perf_counter()
    train_loader = DataLoader(datasets.MNIST(root, train=True, transform=TRANSFORM), 64, shuffle=True)
    test_loader = DataLoader(datasets.MNIST(root, train=False, transform=TRANSFORM), 1000)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    times = []
    for _ in range(epochs):
        began = time.perf_counter()
        MLPTrainer(model, "cross_entropy", optimizer).epoch(train_loader)  # changed
        times.append(time.perf_counter() - began)
    return result(times, accuracy(model, test_loader), started)


VERSIONS = {"plain": plain, "fast": fast}


# ---- the table ----


def result(epochs: list[float], accuracy: float, started: float) -> dict[str, float]:
    return {
        "epoch_s": statistics.median(epochs),
        "total_s": time.perf_counter() - started,
        "accuracy": accuracy,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def mnist_root(data: Path, root: Path) -> None:
    """Puts MNIST's files where torchvision looks for them, unzipped."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in NAMES:
        plain, zipped = data / f"{name}-ubyte", data / f"{name}-ubyte.gz"
        if not plain.is_file() and not zipped.is_file():
            raise SystemExit(
                f"handwriting: {data} has no {plain.name} (or {zipped.name}); --data is a folder with MNIST"
            )
        (raw / plain.name).write_bytes(plain.read_bytes() if plain.is_file() else gzip.decompress(zipped.read_bytes()))


def measure(data: Path, versions: list[str], epochs: int, seeds: int) -> dict[str, list[dict[str, float]]]:
    """Results by version, one for each seed."""
    with tempfile.TemporaryDirectory() as root:
        mnist_root(data, Path(root))
        found: dict[str, list[dict[str, float]]] = {version: [] for version in versions}
        for seed in range(seeds):
            for version in versions:  # in turns
                command = [sys.executable, __file__, "--one", version, root, str(epochs), str(seed)]
                found[version].append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    lines = [f"{'':8}{'epoch':>10}{'end to end':>12}{'accuracy':>18}{'peak memory':>14}"]
    for version, runs in found.items():
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        spread = statistics.stdev(run["accuracy"] for run in runs) if len(runs) > 1 else 0.0
        lines.append(
            f"{version:8}{mean['epoch_s']:8.2f} s{mean['total_s']:10.2f} s"
            f"{mean['accuracy']:10.2%} ± {spread:.2%}{mean['peak_mib']:10.0f} MiB"
        )
    if {"plain", "fast"} <= found.keys():
        ratios = [p["total_s"] / f["total_s"] for p, f in zip(found["plain"], found["fast"], strict=True)]
        lines.append(f"end to end {statistics.mean(ratios):.1f} times as fast")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="MNIST by plain PyTorch and by bigmodel_fast.")
    parser.add_argument("--data", type=Path, help="folder with MNIST's four files")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--versions", default="plain,fast", help="of plain and fast, by comma")
    parser.add_argument("--one", nargs=4, metavar=("VERSION", "ROOT", "EPOCHS", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        version, root, epochs, seed = arguments.one
        print(json.dumps(VERSIONS[version](root, int(epochs), int(seed))))
        return
    versions = arguments.versions.split(",")
    if arguments.data is None or not set(versions) <= set(VERSIONS) or min(arguments.epochs, arguments.seeds) < 1:
        parser.error("needs --data FOLDER, --versions of plain and fast, and 1 or more epochs and seeds")
    print(table(measure(arguments.data, versions, arguments.epochs, arguments.seeds)))


if __name__ == "__main__":
    main()

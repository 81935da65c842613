"""The commands that train, on a GPU, each as a check that fails if a short run does not learn."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from .gpu_checks import Check, Skip

TRAINED_STEPS = 12


def commands(device: torch.device) -> Iterator[Check]:
    for option in ("", "--cuda-graphs", "--compile"):
        yield f"bigmodel-fast pretrain {option}".strip(), partial(trainer, option, device)
    yield "bigmodel-fast finetune", partial(fine_tuning, device)
    for model in ("mlp", "vit"):
        yield f"bigmodel-fast train-image --model {model}", partial(image_training, model, device)


def trainer(option: str, device: torch.device) -> str:
    """A short run of the command; its losses are those of a run without the option, or nearly."""
    with tempfile.TemporaryDirectory() as folder:
        plain, found = losses([], Path(folder), device), losses(option.split(), Path(folder), device)
    nearly = {"": 0.0, "--cuda-graphs": 1e-3, "--compile": 0.02}[option]
    for step, (a, e) in enumerate(zip(found, plain, strict=True), 1):
        assert abs(a - e) <= nearly * e, f"step {step}: loss {a}, without {option or 'a second run'} {e}"
    return f"loss {found[0]:.3f} to {found[-1]:.3f} in {len(found)} steps"


def losses(options: list[str], folder: Path, device: torch.device) -> list[float]:
    out = folder / f"run{len(list(folder.iterdir()))}"
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("\n".join(f"{i} all work and no play makes a dull day" for i in range(4000)))
    run = ["pretrain", "--data", str(text), "--cache", str(folder / "cache"), "--steps", str(TRAINED_STEPS)]
    return command([*run, "--tokenizer", "bytes", *options], out, device)


def command(arguments: list[str], out: Path, device: torch.device) -> list[float]:
    """Losses of a run of `bigmodel-fast`, of each step or epoch; its last line, as an error, if it fails."""
    run = [sys.executable, "-m", "bigmodel_fast", *arguments, "--out", str(out), "--device", device.type]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def fine_tuning(device: torch.device) -> str:
    """On the GPT that a short run of pretrain leaves, in passes of different lengths; twice the same losses."""
    if importlib.util.find_spec("transformers") is None:
        raise Skip("transformers is not installed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        losses([], folder, device)
        data = folder / "data.jsonl"
        data.write_text("".join(json.dumps({"text": "no play " * (1 + i % 30)}) + "\n" for i in range(200)))
        run = ["finetune", "--model", str(folder / "run0"), "--task", "causal", "--data", str(data), "--pack", "false"]
        run += ["--steps", str(TRAINED_STEPS), "--optim.accumulation", "2", "--optim.batch", "8"]
        found, again = (command(run, folder / f"tuned{i}", device) for i in range(2))
    assert found == again, f"losses {found}, then {again}"
    assert found[-1] < found[0], f"losses {found}"
    return f"loss {found[0]:.3f} to {found[-1]:.3f} in {len(found)} steps"


def image_training(model: str, device: torch.device) -> str:
    if importlib.util.find_spec("sklearn") is None:
        raise Skip("scikit-learn, whose digits are learned, is not installed")
    with tempfile.TemporaryDirectory() as folder:
        found = command(["train-image", "--model", model, "--epochs", "2"], Path(folder) / "run", device)
    assert found[-1] < found[0], f"losses {found}"
    return f"loss {found[0]:.3f} to {found[-1]:.3f} in {len(found)} epochs"

"""Checkpoints: folders of safetensors and JSON (never pickle) that are whole or not there.

    <run>/checkpoints/step-00000400/
        model.safetensors      weights
        optimizer.safetensors  states of the optimizer, named <parameter>/<state>
        tokenizer.json
        state.json             everything else, and size and SHA-256 of the other files

One is written under another name, flushed to the disk and renamed, so a crash or a full disk leaves the ones before it
as they were; only then are old ones removed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Tokenizer
from ..models import BERT, GPT, BERTConfig, GPTConfig, Transformer, TransformerConfig
from .errors import CheckpointError

MODELS: dict[str, tuple[Any, Any]] = {  # by objective: a model, and the class of its config
    "clm": (GPT, GPTConfig),
    "mlm": (BERT, BERTConfig),
    "seq2seq": (Transformer, TransformerConfig),
}
FORMAT = 1  # raised when older readers would misread the folder
STATE, MODEL, OPTIMIZER, TOKENIZER = "state.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"


@dataclass
class Checkpoint:
    """A checkpoint that was found whole: its place and its state (see `save_checkpoint`), tensors when asked for."""

    path: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def objective(self) -> str:
        """What its model was trained for; checkpoints from before there was a choice do not say it."""
        return self.state.get("objective", "clm")

    def model(self, device: str | torch.device = "cpu") -> Any:
        """The model with its weights, in evaluation mode; of the class that its objective trains."""
        if self.objective not in MODELS:
            raise CheckpointError(f"{self.path}: of objective {self.objective}, which this version does not know")
        make, config = MODELS[self.objective]
        model = make(config(**self.state["model"])).to(device)
        self.restore(model)
        return model.eval()

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / TOKENIZER)

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Loads the weights into `model`, and what belongs to its parameters into `optimizer`.

        Raises:
            CheckpointError: they are those of another model.
        """
        try:
            model.load_state_dict(_read(self.path / MODEL))
        except RuntimeError:
            raise CheckpointError(f"{self.path}: its weights are those of another model") from None
        if optimizer is None:
            return
        names = _names(model, optimizer)
        states: dict[int, dict[str, Tensor]] = {}
        for key, tensor in _read(self.path / OPTIMIZER).items():
            name, _, part = key.rpartition("/")
            if name not in names:
                raise CheckpointError(f"{self.path}: its optimizer has a state for {name}, which the model lacks")
            states.setdefault(names.index(name), {})[part] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer,
    state: dict[str, Any],
    keep: int = 2,
) -> Path:
    """Writes `folder`/step-<step>, then removes older ones there beyond the newest `keep`; returns its path.

    Args:
        state: what else resuming needs, of what JSON can hold; at least "objective", and "model", the fields of its
            config.

    Raises:
        OSError: it could not be written. The checkpoints before it are intact.
    """
    final = folder / f"step-{step:08d}"
    unfinished = folder / f"{final.name}.unfinished"
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        write_tensors(model, optimizer, unfinished)
        tokenizer.save(unfinished / TOKENIZER)
        files = {f.name: {"bytes": f.stat().st_size, "sha256": _digest(f)} for f in sorted(unfinished.iterdir())}
        text = json.dumps({"format": FORMAT, "step": step, **state, "files": files}, indent=1)
        (unfinished / STATE).write_text(text + "\n", encoding="utf-8")
        for path in (*unfinished.iterdir(), unfinished):
            _flush(path)
        if final.exists():  # a damaged one that the run went past
            shutil.rmtree(final)
        unfinished.rename(final)
        _flush(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    older = [path for path in _newest_first(folder) if path.name < final.name]
    for path in older[keep - 1 :]:
        shutil.rmtree(path, ignore_errors=True)
    return final


def write_model(model: torch.nn.Module, path: Path) -> None:
    """The weights as one safetensors file."""
    _write(model.state_dict(), path)


def write_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Weights and states of the optimizer, as `Checkpoint.restore` reads them."""
    write_model(model, folder / MODEL)
    names = _names(model, optimizer)
    states = optimizer.state_dict()["state"]
    _write({f"{names[i]}/{k}": v for i, s in states.items() for k, v in s.items()}, folder / OPTIMIZER)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: its folder, or a run's, of which the newest good one is taken.

    Raises:
        CheckpointError: there is none, or it is damaged (each file's size and SHA-256 are checked).
    """
    path = Path(path).expanduser()
    if (path / STATE).exists() or not (path / "checkpoints").is_dir():
        return _verified(path)
    checkpoint, damaged = newest_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(damaged[0] if damaged else f"{path}: no checkpoint in it")
    return checkpoint


def newest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest good checkpoint of a run's folder, if any, and what is wrong with those after it."""
    damaged: list[str] = []
    for path in checkpoint_folders(run):
        try:
            return _verified(path), damaged
        except CheckpointError as error:
            damaged.append(str(error))
    return None, damaged


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints in a run's folder, newest first, good or not."""
    return _newest_first(run / "checkpoints")


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdigit()), reverse=True)


def _verified(path: Path) -> Checkpoint:
    try:
        text = (path / STATE).read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path}: no checkpoint here ({STATE}: {error.strerror})") from None
    try:
        state = json.loads(text)
        if state["format"] != FORMAT:
            raise CheckpointError(f"{path}: of format {state['format']}, this version reads format {FORMAT}")
        files = {name: (int(f["bytes"]), str(f["sha256"])) for name, f in state["files"].items()}
        complete = {MODEL, OPTIMIZER, TOKENIZER} <= files.keys() and {"step", "model"} <= state.keys()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        complete = False
    if not complete:
        raise CheckpointError(f"{path}: damaged ({STATE} is not that of a checkpoint)")
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path}: damaged ({name} is missing)")
        if file.stat().st_size != size:
            raise CheckpointError(f"{path}: damaged ({name} has {file.stat().st_size} bytes of {size})")
        if _digest(file) != digest:
            raise CheckpointError(f"{path}: damaged ({name} is not what was written)")
    return Checkpoint(path, state)


def _names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The name of each parameter of the optimizer, in the order its state dict counts them."""
    named = {parameter: name for name, parameter in model.named_parameters()}
    return [named[p] for group in optimizer.param_groups for p in group["params"]]


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # a full disk, most likely
        raise OSError(f"{path.name}: {error}") from None


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path.parent}: {path.name} cannot be read ({error})") from None


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as f:
        while block := f.read(1 << 22):
            yield block


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

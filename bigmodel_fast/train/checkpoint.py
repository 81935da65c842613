"""Checkpoints: folders of safetensors and JSON (never pickle) that are whole or not there.

    <run>/checkpoints/LATEST       the name of the newest one
    <run>/checkpoints/step-00000400/
        model.safetensors      weights
        optimizer.safetensors  states of the optimizer, named <parameter>/<state>
        tokenizer.json         of runs that have one
        state.json             everything else, and size and SHA-256 of the other files

One is written under another name, flushed to the disk and renamed, so a crash or a full disk leaves the ones before it
as they were; only then are old ones removed. Runs whose ranks hold shards write a file each, shard-*.safetensors,
instead of the first two (see `shards`).
"""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Tokenizer
from ..models import BERT, GPT, BERTConfig, GPTConfig, Transformer, TransformerConfig
from . import durable, safefiles, shards
from .errors import CheckpointError
from .safefiles import Entry, damaged, read_tensors, write_tensors

MODELS: dict[str, tuple[Any, Any]] = {  # by objective: a model, and the class of its config
    "clm": (GPT, GPTConfig),
    "mlm": (BERT, BERTConfig),
    "seq2seq": (Transformer, TransformerConfig),
}
FORMAT = 1  # raised when older readers would misread the folder
STATE, MODEL, OPTIMIZER, TOKENIZER = "state.json", "model.safetensors", "optimizer.safetensors", "tokenizer.json"
LATEST = "LATEST"
SCORE = "validation_loss"  # of state.json: the best checkpoint has the lowest
BUFFER_BYTES = 64 << 20  # a model may hold so much beside its weights, and four times as much as them
OTHER_BYTES = 64 << 20  # of a file that holds no tensors

Tensors = dict[str, Tensor]


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
        return str(self.state.get("objective", "clm"))

    def model(self, device: str | torch.device = "cpu") -> Any:
        """The model with its weights, in evaluation mode; of the class that its objective trains."""
        if self.objective not in MODELS:
            raise CheckpointError(f"{self.path}: of objective {self.objective}, which this version does not know")
        make, config = MODELS[self.objective]
        model = self.build(lambda: make(config(**self.state["model"]))).to(device)
        self.restore(model)
        return model.eval()

    def build(self, make: Callable[[], Any]) -> Any:
        """What `make` makes of "model" in the state, once it is known to be no larger than the weights here.

        Raises:
            CheckpointError: a shape that no model has, or another than the weights'.
        """
        shapes = {name: entry.shape for name, entry in self._tensors()[0].items()}
        elements = sum(map(math.prod, shapes.values()))
        fields = self.state["model"].items() if isinstance(self.state["model"], dict) else ()
        for name, value in fields:
            if isinstance(value, int) and value > (len(shapes) if name == "layers" else max(elements, 1 << 20)):
                raise CheckpointError(f"{self.path}: its model has {name} {value}, but {elements} weights in all")
        try:
            with torch.device("meta"):
                model = make()
            others = sum(b.numel() * b.element_size() for b in model.buffers())
        except (TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.path}: its model cannot be made ({error})") from None
        if {k: tuple(v.shape) for k, v in model.state_dict().items()} != shapes:
            raise CheckpointError(f"{self.path}: its weights are those of another model")
        if others > BUFFER_BYTES + 16 * elements:
            raise CheckpointError(f"{self.path}: its model would take {others} bytes beside its weights")
        return make()

    def tokenizer(self) -> Tokenizer:
        """CheckpointError if its file is none of a tokenizer."""
        path = self.path / TOKENIZER
        safefiles.plain_file(path)
        try:
            return Tokenizer.load(path)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the tokenizers library raises Exception itself, and panics that are none
            damaged(path, f"is no tokenizer: {' '.join(str(error).split())[:200]}")

    def _tensors(self) -> tuple[dict[str, Entry], dict[str, Entry]]:
        """The weights, and the states of the optimizer, that its files hold."""
        found = shards.whole_tensors(self.path)
        return ({k: v for k, v in found.items() if "/" not in k}, {k: v for k, v in found.items() if "/" in k})

    def restore(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Loads the weights into `model`, and what belongs to its parameters into `optimizer`; both may be in shards.

        Raises:
            CheckpointError: they are those of another model.
        """
        (stored, stored_states), weights = self._tensors(), model_tensors(model)
        if {k: tuple(v.shape) for k, v in weights.items()} != {k: v.shape for k, v in stored.items()}:
            raise CheckpointError(f"{self.path}: its weights are those of another model")
        if shards.has_shards(model) or not (self.path / MODEL).exists():
            states = {} if optimizer is None else _empty_states(model, stored_states)
            shards.read_shards({**weights, **states}, self.path)
        else:
            read_model(model, self.path / MODEL)
            states = {} if optimizer is None else read_tensors(self.path / OPTIMIZER)
        if optimizer is not None:
            self._restore_states(states, model, optimizer)

    def _restore_states(self, tensors: Tensors, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """States named <parameter>/<state>, into the optimizer of the model's parameters."""
        names, parameters = parameter_names(model, optimizer), dict(model.named_parameters())
        states: dict[int, Tensors] = {}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition("/")
            if name not in names:
                raise CheckpointError(f"{self.path}: its optimizer has a state for {name}, which the model lacks")
            if tensor.dim() and tensor.shape != parameters[name].shape:
                raise CheckpointError(f"{self.path}: its optimizer's {key} has the shape {list(tensor.shape)}")
            states.setdefault(names.index(name), {})[part] = tensor
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _empty_states(model: torch.nn.Module, stored: dict[str, Entry]) -> Tensors:
    """Zeros for states named <parameter>/<state>, sharded as their parameters are."""
    parameters, states = dict(model.named_parameters()), {}
    for key, entry in stored.items():
        parameter = parameters.get(key.rpartition("/")[0])
        if parameter is None or not entry.shape:
            states[key] = torch.zeros(entry.shape)
        else:
            states[key] = torch.zeros_like(parameter)
    return states


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    tokenizer: Tokenizer | None,
    state: dict[str, Any],
    keep: int = 2,
    keep_best: int = 0,
) -> Path:
    """Writes `folder`/step-<step>, then removes older ones there beyond the newest `keep`; returns its path.

    Args:
        state: what else resuming needs, of what JSON can hold; at least "objective", and "model", the fields of its
            config.
        keep_best: keep so many more, those whose "validation_loss" in the state is lowest.

    Raises:
        OSError: it could not be written. The checkpoints before it are intact.
    """
    weights, states = model_tensors(model), optimizer_tensors(model, optimizer)

    def fill(unfinished: Path) -> None:
        write_tensors(weights, unfinished / MODEL)
        write_tensors(states, unfinished / OPTIMIZER)

    return write_checkpoint(folder, step, fill, tokenizer, state, keep, keep_best)


def write_checkpoint(
    folder: Path,
    step: int,
    fill: Callable[[Path], None],
    tokenizer: Tokenizer | None,
    state: dict[str, Any],
    keep: int,
    keep_best: int = 0,
) -> Path:
    """As `save_checkpoint`, with tensors that `fill` writes into the folder it is given."""
    final = step_folder(folder, step)

    def fill_all(unfinished: Path) -> None:
        fill(unfinished)
        if tokenizer is not None:
            tokenizer.save(unfinished / TOKENIZER)
        written = sorted(unfinished.iterdir())
        files = {f.name: {"bytes": f.stat().st_size, "sha256": durable.digest(f)} for f in written}
        text = json.dumps({"format": FORMAT, "step": step, **state, "files": files}, indent=1)
        (unfinished / STATE).write_text(text + "\n", encoding="utf-8")

    durable.write_folder(final, fill_all)
    durable.write_text(folder / LATEST, final.name + "\n")
    older = [path for path in _newest_first(folder) if path.name < final.name]
    best = sorted([*older, final], key=_score)[:keep_best]
    for path in older[keep - 1 :]:
        if path not in best or _score(path) == math.inf:
            durable.remove_folder(path)
    for path in folder.glob(f"step-*{durable.REMOVED}"):  # a crash came between its two halves
        durable.remove_folder(path)
    return final


def step_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"step-{step:08d}"


def _score(path: Path) -> float:
    """A checkpoint's validation loss; infinity for one without, or whose state cannot be read."""
    with contextlib.suppress(CheckpointError, KeyError, TypeError, ValueError):
        score = float(safefiles.read_json(path / STATE)[SCORE])
        return math.inf if math.isnan(score) else score
    return math.inf


def model_tensors(model: torch.nn.Module) -> Tensors:
    """The weights by name; the model's own, not copies. Those that are tied are there once, by their first name."""
    state, firsts = model.state_dict(), set(_first_names(model).values())
    return {name: tensor for name, tensor in state.items() if name in firsts}


def _first_names(model: torch.nn.Module) -> dict[str, str]:
    """For each name in the model's state dict the first name of the same tensor."""
    firsts: dict[int, str] = {}
    return {name: firsts.setdefault(id(t), name) for name, t in model.state_dict(keep_vars=True).items()}


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """States of the optimizer as <parameter>/<state>; its own, not copies."""
    names = parameter_names(model, optimizer)
    states = optimizer.state_dict()["state"]
    return {f"{names[i]}/{k}": v for i, s in states.items() for k, v in s.items()}


def parameter_names(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The name of each parameter of the optimizer, in the order its state dict counts them."""
    named = {parameter: name for name, parameter in model.named_parameters()}
    return [named[p] for group in optimizer.param_groups for p in group["params"]]


def write_model(model: torch.nn.Module, path: Path) -> None:
    """The weights as one safetensors file."""
    write_tensors(model_tensors(model), path)


def read_model(model: torch.nn.Module, path: Path) -> None:
    """Loads what `write_model` wrote; CheckpointError for the weights of another model."""
    tensors = read_tensors(path)
    tied = {name: tensors[first] for name, first in _first_names(model).items() if first in tensors}
    try:
        model.load_state_dict(tensors | tied)
    except RuntimeError:
        raise CheckpointError(f"{path.parent}: its weights are those of another model") from None


def export(path: str | Path, out: Path) -> None:
    """The weights of the checkpoint at `path` (see `load_checkpoint`), in shards or whole, as one safetensors file.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    checkpoint = load_checkpoint(path)
    stored, _ = checkpoint._tensors()
    weights = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in stored.items()}
    shards.read_shards(weights, checkpoint.path)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(weights, out)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: its folder, or a run's, of which the newest good one is taken.

    Raises:
        CheckpointError: there is none, or it is damaged (each file's size and SHA-256 are checked).
    """
    path = Path(path).expanduser()
    if (path / STATE).exists() or not (path / "checkpoints").is_dir():
        return _verified(path)
    checkpoint, damage = newest_checkpoint(path)
    if checkpoint is None:
        raise CheckpointError(damage[0] if damage else f"{path}: no checkpoint in it")
    return checkpoint


def newest_checkpoint(run: Path, before: Path | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest good checkpoint of a run's folder (before another one), if any, and what is wrong with later ones."""
    damage: list[str] = []
    for path in checkpoint_folders(run):
        if before is not None and path.name >= before.name:
            continue
        try:
            return _verified(path), damage
        except CheckpointError as error:
            damage.append(str(error))
    return None, damage


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints in a run's folder, newest first, good or not."""
    return _newest_first(run / "checkpoints")


def _newest_first(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdigit()), reverse=True)


def _verified(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(path)
    for name, entry in checkpoint.state["files"].items():
        if durable.digest(path / name) != entry["sha256"]:
            damaged(path / name, "is not what was written")
    return checkpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, whose files are of the right size; their contents are not compared with their sums.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if not (path / STATE).is_symlink() and not (path / STATE).exists():
        raise CheckpointError(f"{path}: no checkpoint here ({STATE} is missing)")
    state = safefiles.read_json(path / STATE)
    try:
        if state["format"] != FORMAT:
            raise CheckpointError(f"{path}: of format {str(state['format'])[:20]}, this version reads format {FORMAT}")
        files = {str(name): int(f["bytes"]) for name, f in state["files"].items() if isinstance(f["sha256"], str)}
        whole = {"step", "model"} <= state.keys() and type(state["step"]) is int and state["step"] >= 0
        complete = whole and ({MODEL, OPTIMIZER} <= files.keys() or any(n.startswith(shards.PREFIX) for n in files))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        if isinstance(error, CheckpointError):
            raise
        complete = False
    if not complete:
        raise CheckpointError(f"{path}: damaged ({STATE} is not that of a checkpoint)")
    for name in files:
        if not safefiles.plain_name(name):
            raise CheckpointError(f"{path}: damaged ({STATE} names {name[:80]!r}, which is no file in its folder)")
    for name, size in files.items():
        file = path / name
        if (there := safefiles.plain_file(file)) != size:
            damaged(file, f"has {there} bytes of {size}")
        if name.endswith(".safetensors"):
            safefiles.read_header(file)
        elif size > OTHER_BYTES:
            damaged(file, f"has {size} bytes; at most {OTHER_BYTES} are read")
    return Checkpoint(path, state)

"""What a run needs before its first step: a device, a folder, the checkpoint it goes on from, an optimizer."""

import base64
import contextlib
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import cpu_isa
from .._machine import cannot_compile
from ..data import Tokenizer
from ..optim import AdamW
from .checkpoint import (
    Checkpoint,
    checkpoint_folders,
    load_checkpoint,
    newest_checkpoint,
    open_checkpoint,
    step_folder,
)
from .config import TrainConfig
from .distributed import Ranks
from .durable import remove_folder
from .errors import CheckpointError, ConfigError


def require_packages(config: TrainConfig) -> None:
    """ModuleNotFoundError now, not after hours of training, for a package that this run needs later."""
    require("safetensors", "matplotlib", "yaml", *(["tensorboard"] if config.tensorboard else []))


def require(*packages: str) -> None:
    """ModuleNotFoundError for the first package that is not installed."""
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def pick_device(name: str) -> torch.device:
    """The device for a setting of auto, cpu or cuda."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device: cuda was asked for, but this torch finds no CUDA device")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> str:
    """bf16 or fp32 for a setting of auto, bf16 or fp32: what multiplies faster on the device."""
    if name != "auto":
        return name
    return "bf16" if device.type == "cuda" or cpu_isa() == "avx512_bf16" else "fp32"


def require_features(config: TrainConfig, device: torch.device, ranks: int) -> None:
    """ConfigError for compile or cuda_graphs where they cannot work."""
    if config.cuda_graphs and ranks > 1:
        raise ConfigError(f"cuda_graphs: for one rank only, and the run has {ranks}")
    if config.cuda_graphs and device.type != "cuda":
        raise ConfigError(f"cuda_graphs: needs a CUDA device, and the run is on {device.type}")
    if config.cuda_graphs and config.recompute:
        raise ConfigError("cuda_graphs: not with recompute, which restores random numbers that a graph cannot")
    if config.compile and (reason := cannot_compile(device.type)):
        raise ConfigError(f"compile: {reason}")


def open_folder(out: Path) -> list[Path]:
    """Makes the folder of the run; returns what it had to make, innermost first. ConfigError if it is not writable."""
    missing = [path for path in (out, *out.parents) if not path.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        remove_empty(missing)
        raise ConfigError(f"out: cannot write to {out} ({error.strerror})") from None
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Removes folders, innermost first, up to one that holds something."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def find_checkpoint(config: TrainConfig, ranks: Ranks, tell: Callable[[str], None]) -> Checkpoint | None:
    """The checkpoint that `config.resume` means, or None to begin anew; a run that is there is never overwritten.

    Rank 0 looks, and verifies what it finds.

    Raises:
        ConfigError, CheckpointError: it is not there, damaged, or would mix two runs in one folder.
    """
    found = find_own_checkpoint(config, tell) if ranks.first else None
    if config.resume == "never" or ranks.size == 1:
        ranks.wait()
        return found
    if config.resume == "auto":
        return _of_first(found, config.out_folder, ranks)
    ranks.wait()
    return found or load_checkpoint(config.resume)


def checkpoint_before(out: Path, suspect: Path | None, ranks: Ranks) -> Checkpoint | None:
    """The newest good checkpoint of a run; older than `suspect`, which is removed, if it is given."""
    found = None
    if ranks.first:
        found, _ = newest_checkpoint(out, before=suspect)
        if suspect is not None and found is not None:
            remove_folder(suspect)
    return _of_first(found, out, ranks)


def _of_first(found: Checkpoint | None, out: Path, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint in a run's folder that rank 0 has found."""
    step = ranks.of_first(found.step if found is not None else -1)
    return found if ranks.first or step < 0 else open_checkpoint(step_folder(out / "checkpoints", step))


def find_own_checkpoint(config: Any, tell: Callable[[str], None]) -> Checkpoint | None:
    """As `find_checkpoint`, of a run of one rank; `config` has out_folder and resume."""
    out = config.out_folder
    present = checkpoint_folders(out)
    if config.resume == "never":
        if present:
            raise ConfigError(f"out: {out} holds a run already; go on with --resume auto, or choose another --out")
        return None
    if config.resume == "auto":
        checkpoint, damaged = newest_checkpoint(out)
        if damaged and checkpoint is None:
            raise CheckpointError(damaged[0])
        for text in damaged:
            tell(f"{text}; passed over")
        return checkpoint
    checkpoint = load_checkpoint(config.resume)
    later = [path for path in present if path.name > checkpoint.path.name]
    if later:
        raise ConfigError(f"out: {later[0]} is later than the checkpoint to resume; choose another --out")
    return checkpoint


def require_same_run(config: TrainConfig, ranks: Ranks, dtype: str, checkpoint: Checkpoint) -> None:
    """CheckpointError, naming the key, for a checkpoint of another model, optimizer, tokenizer, seed or dtype.

    The number of ranks may change as long as the sequences of a step do not.
    """
    try:
        before = TrainConfig.from_dict(checkpoint.state["config"]).over(int(checkpoint.state["ranks"]))
        dtype_before = checkpoint.state["dtype"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{checkpoint.path}: not of a run of this version's pretrain") from None
    config = config.over(ranks.size)
    different = [(key, before.value(key), config.value(key)) for key in config.differences(before)]
    if dtype != dtype_before:
        different.append(("dtype", dtype_before, dtype))
    if different:
        key, theirs, ours = different[0]
        raise CheckpointError(
            f"{checkpoint.path}: of another run ({key} is {theirs} there and {ours} here); "
            f"take its settings with --config {checkpoint.path.parents[1] / 'config.yaml'}"
        )


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> AdamW:
    """AdamW that lets matrices decay and leaves biases and norms alone."""
    o = config.optim
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return AdamW(groups, lr=o.lr, betas=o.betas)


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each token stands for: [vocab_size]."""
    return np.array([len(tokenizer.bytes_of([token])) for token in range(tokenizer.vocab_size)])


def write_config(config: TrainConfig, out: Path) -> None:
    """`out`/config.yaml: the whole config, as `--config` takes it."""
    import yaml

    (out / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")


def random_state(device: torch.device) -> dict[str, str]:
    """torch's random generators, of the CPU and of the device, as text."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_random_state(states: dict[str, str], device: torch.device) -> None:
    """Takes up what `random_state` gave."""
    tensors = {name: torch.frombuffer(bytearray(base64.b64decode(s)), dtype=torch.uint8) for name, s in states.items()}
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)

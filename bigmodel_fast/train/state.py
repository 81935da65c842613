"""What a checkpoint knows of a run beside its tensors, and how a run takes it up again."""

import dataclasses
import json
from typing import TYPE_CHECKING, Any, cast

from . import setup
from .checkpoint import Checkpoint
from .errors import CheckpointError

if TYPE_CHECKING:
    from .loop import Trainer


def state_of(trainer: "Trainer") -> dict[str, Any]:
    """Position in the data, random numbers of all ranks, and the like, of what JSON holds; all ranks call it."""
    evaluation, device = trainer.evaluation, trainer.device
    random = trainer.ranks.gather(json.dumps(setup.random_state(device)).encode())
    return {
        "objective": trainer.config.objective,
        "model": dataclasses.asdict(cast(Any, trainer.model.config)),
        "config": trainer.config.to_dict(),
        "ranks": trainer.ranks.size,
        "dtype": trainer.dtype,
        "elapsed": trainer.elapsed,
        "batches": trainer.feed.state_dict(),
        "corpus": trainer.objective.corpus,
        "health": trainer.health.state_dict(),
        "random": [json.loads(text) for text in random],
        "validation_loss": evaluation.loss if evaluation and evaluation.step == trainer.step else None,
    }


def take_up(trainer: "Trainer", checkpoint: Checkpoint) -> None:
    """Brings a run to where it was when the checkpoint was written.

    Raises:
        CheckpointError: of another text or model, or damaged.
    """
    state, ranks = checkpoint.state, trainer.ranks
    if state.get("corpus") != trainer.objective.corpus:
        raise CheckpointError(f"{checkpoint.path}: trained on another text than there is at data now")
    checkpoint.restore(trainer.model, trainer.optimizer)
    try:
        trainer.feed.load_state_dict(state["batches"])
        trainer.health.load_state_dict(state["health"])
        if ranks.rank < len(state["random"]):
            setup.set_random_state(state["random"][ranks.rank], trainer.device)
        else:  # saved by fewer ranks
            ranks.seed(trainer.config.seed + checkpoint.step)
        trainer.step, trainer.elapsed = checkpoint.step, float(state["elapsed"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path}: damaged (state.json: {' '.join(str(error).split())})") from None
    trainer.checkpoint = checkpoint.path

"""Failures on the way of a run, as one line that says what to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import TrainError, is_out_of_memory


@contextmanager
def told(out: Path, where: Callable[[], str], advice: Callable[[], str], saved: Callable[[], str]) -> Iterator[None]:
    """Turns failures within into a TrainError: a full disk, too little memory.

    Args:
        where: how far the run has come, such as "step 12".
        advice: what to do about too little memory.
        saved: what is left of the run.
    """
    try:
        yield
    except BrokenPipeError:  # whoever read what the run printed is gone
        raise
    except OSError as error:
        reason = error.strerror or error
        raise TrainError(f"{where()}: cannot write to {out} ({reason}){saved()}") from error
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise TrainError(f"{where()}: {advice()}{saved()}") from None
        raise


def smaller_passes(batch: int, accumulation: int, alone: str) -> str:
    """What to do about too little memory: the same step in more passes, each half as large or less.

    Args:
        alone: what to do if a pass has one sequence only.
    """
    if batch == 1:
        return f"out of memory with one sequence a pass; {alone}"
    smaller = next(b for b in range(batch // 2, 0, -1) if batch % b == 0)
    return (
        f"out of memory with {batch} sequences a pass; --optim.batch {smaller} "
        f"--optim.accumulation {accumulation * batch // smaller} keeps the tokens of a step"
    )

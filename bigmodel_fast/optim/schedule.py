"""Learning-rate schedules, as functions of the step."""

import math


def warmup_cosine(step: int, steps: int, warmup: int, floor: float = 0.1) -> float:
    """The factor of the learning rate at `step` (from 0) of `steps`: up to 1 over `warmup` steps, then down to `floor`.

    The way down is half a cosine (Loshchilov and Hutter 2017).
    """
    if step < warmup:
        return (step + 1) / warmup
    return cosine((step - warmup) / max(1, steps - warmup), floor)


def cosine(done: float, floor: float = 0.1) -> float:
    """The factor of the learning rate when the share `done` (0 to 1) of a budget is spent: from 1 down to `floor`."""
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def linear(done: float, floor: float = 0.0) -> float:
    """As `cosine`, in a straight line."""
    return floor + (1 - floor) * (1 - min(1.0, done))

"""Steps that nothing should be learned from: losses that are not finite, and spikes."""

import math
from typing import Any

BAD_STEPS = 10  # in a row, after which a run goes back to a checkpoint
MEMORY = 0.98  # of the averages of losses: the last fifty or so count
FIRST_SPIKE = 50  # good steps before which no loss is called a spike: it falls fast at first
LEAST_RISE = 1.5  # a spike is also so many times the average


class Health:
    """Judges each step by its loss, beside a running mean and variance of those before.

    Args:
        spike: standard deviations above the mean from which on a loss is a spike. 0: none is.
    """

    def __init__(self, spike: float):
        self.spike = spike
        self.bad = 0  # steps in a row
        self._mean, self._variance, self._good = 0.0, 0.0, 0

    def fault(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step of this loss and gradient norm; None if it can be learned from."""
        found = self._judge(loss, norm)
        if found:
            self.bad += 1
            return found
        self.bad = 0
        self._good += 1
        share = max(1 - MEMORY, 1 / self._good)
        change = loss - self._mean
        self._mean += share * change
        self._variance = (1 - share) * (self._variance + share * change * change)
        return None

    def _judge(self, loss: float, norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"no finite loss and gradient (loss {loss}, norm {norm})"
        limit = max(self._mean + self.spike * math.sqrt(self._variance), LEAST_RISE * self._mean)
        if self.spike and self._good >= FIRST_SPIKE and loss > limit:
            return f"a spike of the loss ({loss:.4g} after {self._mean:.4g})"
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"bad": self.bad, "mean": self._mean, "variance": self._variance, "good": self._good}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bad, self._good = int(state["bad"]), int(state["good"])
        self._mean, self._variance = float(state["mean"]), float(state["variance"])

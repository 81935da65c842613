"""Launch choices by measurement, if asked for: BMF_AUTOTUNE=1.

Without it, choices follow from shapes and the GPU, and nothing here does anything. With it, the first call of a shape
class times the few candidates that a kernel has, on its own tensors, which waits for the device; later calls, and later
processes, find the fastest in a file: `$XDG_CACHE_HOME/bigmodel_fast/autotune` (or ~/.cache/...), one for each GPU,
driver and version of Triton. The file is replaced as a whole, so processes that share it never read half of one; one
that cannot be read is measured anew. Results may differ in their last bits from those of other choices. A CUDA graph's
capture measures nothing.
"""

import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from . import launch

Choice = TypeVar("Choice")
ENABLED = launch.switch("BMF_AUTOTUNE")
WARM_UP, REPEAT = 10, 40  # milliseconds for each candidate


def _milliseconds(start: Callable[[], object]) -> float:
    return triton.testing.do_bench(start, warmup=WARM_UP, rep=REPEAT, return_mode="median")


def _plain(choice: object) -> dict[str, Any] | None:
    """As JSON has it."""
    return asdict(choice) if is_dataclass(choice) and not isinstance(choice, type) else None


class Tuner:
    """The choices in a file, and those that are still to be made.

    milliseconds: what a call takes; OutOfResources for one that the GPU has no room for.
    """

    def __init__(self, path: Path, milliseconds: Callable[[Callable[[], object]], float] = _milliseconds) -> None:
        self.path, self.milliseconds = path, milliseconds
        self.choices = self._read()

    def _read(self) -> dict[str, Any]:
        try:
            choices = json.loads(self.path.read_text())["choices"]
            if not isinstance(choices, dict):
                raise TypeError("choices must be an object")
            return choices
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{self.path} holds no launch choices ({error!r}); measuring anew", stacklevel=2)
            return {}

    def _write(self) -> None:
        """With what other processes have found in the meantime."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    self.choices = self._read() | self.choices
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".new")
            with os.fdopen(handle, "w") as file:
                json.dump({"choices": self.choices}, file, indent=1, sort_keys=True)
            os.replace(name, self.path)
        except OSError as error:
            warnings.warn(f"launch choices are lost with this process: {error}", stacklevel=2)

    def _time(self, start: Callable[[], object]) -> float:
        try:
            return self.milliseconds(start)
        except OutOfResources:
            return math.inf

    def pick(self, key: str, candidates: Sequence[Choice], start: Callable[[Choice], object]) -> Choice:
        """The candidate that `start` runs fastest with; the first one if none fits."""
        for candidate in candidates:
            if key in self.choices and _plain(candidate) == self.choices[key]:
                return candidate
        times = [self._time(lambda c=candidate: start(c)) for candidate in candidates]  # type: ignore[misc]
        best = candidates[times.index(min(times))]
        self.choices[key] = _plain(best)
        self._write()
        return best


_tuners: dict[int, Tuner] = {}


def _file_of(device: torch.device) -> Path:
    """One for each GPU, driver and version of Triton."""
    try:
        driver = re.search(r"\d+\.\d+(\.\d+)?", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        driver = None
    parts = (torch.cuda.get_device_name(device), driver[0] if driver else f"cuda {torch.version.cuda}", "triton")
    name = re.sub(r"[^\w.]+", "-", f"{' '.join(parts)} {triton.__version__}")
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "bigmodel_fast" / "autotune" / f"{name}.json"


def _tuner_for(t: Tensor) -> Tuner | None:
    """None where nothing can be timed: off a GPU, or while a CUDA graph is captured."""
    if not t.is_cuda or torch.cuda.is_current_stream_capturing():
        return None
    index = t.device.index
    if index not in _tuners:
        _tuners[index] = Tuner(_file_of(t.device))
    return _tuners[index]


def pick(
    kernel: str,
    shape_class: tuple[object, ...],
    candidates: Sequence[Choice],
    start: Callable[[Choice], object],
    t: Tensor,
) -> Choice:
    """One of `candidates`, of which the first is what shapes and the GPU suggest.

    Args:
        kernel, shape_class: what a choice is remembered by, beside t's dtype.
        candidates: dataclasses of numbers and strings, or None for "not by a kernel of ours".
        start: runs the kernel with a candidate; it may run several times, and must give the same each time.
        t: a tensor that lies on the device.
    """
    if not ENABLED or len(candidates) < 2 or (tuner := _tuner_for(t)) is None:
        return candidates[0]
    key = " ".join(str(part).removeprefix("torch.") for part in (kernel, t.dtype, *shape_class))
    with launch.on_device(t.device):
        return tuner.pick(key, candidates, start)

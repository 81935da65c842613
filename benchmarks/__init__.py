"""The benchmarks: `bench_<op>.py` declares what is run, the other files how it is measured. See docs/benchmarks.md.

Installed as `bigmodel_fast.benchmarks`, in front of which stands the command `bigmodel-fast bench`.
"""

import importlib
import pkgutil

from .cases import Benchmark

_PREFIX = "bench_"


def names() -> list[str]:
    """What can be benchmarked: one name for each file `bench_<name>.py` in this folder."""
    return sorted(m.name.removeprefix(_PREFIX) for m in pkgutil.iter_modules(__path__) if m.name.startswith(_PREFIX))


def load(name: str) -> Benchmark:
    """The benchmark declared in `bench_<name>.py`."""
    benchmark: Benchmark = importlib.import_module(f"{__name__}.{_PREFIX}{name}").BENCHMARK
    return benchmark

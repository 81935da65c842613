"""Lets pytest-benchmark run the same files: `pytest benchmarks/bench_attention.py -k "causal and bf16"`.

Each case, dtype and provider becomes a test; it fails if the provider is wrong. pytest-benchmark times one provider
after another, so its figures are for work on one of them; for comparisons use `bigmodel-fast bench`.
"""

from collections.abc import Callable

import pytest
import torch

from bigmodel_fast._machine import cannot_compile

from .cases import COMPILE, Benchmark, Case
from .devices import Cpu
from .engine import by_direction, errors, verdict


def pytest_pycollect_makeitem(collector: pytest.Module, name: str, obj: object) -> list[pytest.Function] | None:
    if not isinstance(obj, Benchmark):
        return None
    return [
        pytest.Function.from_parent(collector, name=f"{obj.name}[{case.name}-{dtype}-{provider}]", callobj=test)
        for case in obj.cases
        for dtype in case.dtypes
        for provider in obj.providers(case, dtype, "cpu")
        if provider != COMPILE or cannot_compile("cpu") is None
        for test in [_test(obj, case, dtype, provider)]
    ]


def _test(declared: Benchmark, case: Case, dtype: str, provider: str) -> Callable:
    def test(benchmark) -> None:
        device = Cpu(torch.device("cpu"))
        inputs = declared.inputs(case, dtype, device.device)
        task = declared.task(provider, case, inputs, dtype)
        found = errors(task.results(), declared.exact(case, inputs))
        benchmark.extra_info.update(errors=by_direction(found))
        assert verdict(found, None, dtype) == "ok"
        benchmark(task.run, device, 1)

    return test

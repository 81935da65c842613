"""Run by test_interpreter.py in a process of its own, under TRITON_INTERPRET=1: the public operators on CPU tensors,
with the Triton launchers in place of the C++ kernels, on the samples that every operator is specified by.
"""

import importlib
import math
import os
from collections.abc import Iterator

import pytest
import torch
from bigmodel_fast.kernels import launch
from compare import assert_matches, forward
from specs import Layout, Sample, Spec, all_specs, case_id
from test_layouts import LAYOUTS
from test_special_values import kinds

from bigmodel_fast import _dispatch, kernels

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_interpreter.py"

KERNELS_OF = {"attention_varlen": "attention"}  # a second front to the same kernels
CHOSEN = [spec for spec in all_specs() if spec.name in os.environ["BMF_INTERPRETED"].split(",")]
SMALL = launch.Target(90, 2)  # so few processors that programs have several rows and blocks each
library = torch.library.Library("bigmodel_fast", "IMPL")


@pytest.fixture(autouse=True, scope="module")
def launchers() -> Iterator[None]:
    """The launchers as the CPU implementation, for all dtypes that they take on a GPU."""
    for stem in {KERNELS_OF.get(spec.name, spec.name) for spec in CHOSEN}:
        for name, function in importlib.import_module(f"{kernels.__name__}.{stem}").OPERATORS.items():
            library.impl(name, function, "CPU")
    with pytest.MonkeyPatch.context() as patch, launch.assume(SMALL):
        patch.setattr(_dispatch, "unsupported", lambda *tensors: None)
        yield


def dtypes_of(spec: Spec) -> list[torch.dtype]:
    """The interpreter multiplies matrices of bfloat16 as if they were integers; attention's kernels alone do so."""
    narrow = [torch.float16] if spec.name.startswith("attention") else [torch.float16, torch.bfloat16]
    return [torch.float32, *narrow]


SAMPLES = [(spec, s, dtype) for spec in CHOSEN for s in spec.samples[:-1] for dtype in dtypes_of(spec)]
each_spec = pytest.mark.parametrize("spec", CHOSEN, ids=case_id)


@pytest.mark.parametrize(("spec", "sample", "dtype"), SAMPLES, ids=case_id)
def test_samples(spec: Spec, sample: Sample, dtype: torch.dtype) -> None:
    assert_matches(spec, sample, sample.tensors(dtype))


@each_spec
def test_largest_sample(spec: Spec) -> None:
    assert_matches(spec, spec.samples[-1], spec.samples[-1].tensors(torch.float16))


@pytest.mark.parametrize(("spec", "sample"), [(spec, s) for spec in CHOSEN for s in spec.empty], ids=case_id)
def test_empty(spec: Spec, sample: Sample) -> None:
    assert_matches(spec, sample, sample.tensors(torch.float32))


@pytest.mark.parametrize("n", [1, 2, 17, 65])
@each_spec
def test_tails(spec: Spec, n: int) -> None:
    assert_matches(spec, spec.tail(n), spec.tail(n).tensors(torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@each_spec
def test_strides(spec: Spec, layout: Layout) -> None:
    sample = spec.samples[1]
    assert_matches(spec, sample, sample.tensors(torch.float32, layout=layout), layout=layout)


@pytest.mark.parametrize("spec", [spec for spec in CHOSEN if spec.mixed], ids=case_id)
def test_float32_weights(spec: Spec) -> None:
    assert_matches(spec, spec.samples[1], spec.samples[1].tensors(torch.bfloat16, torch.float32))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@each_spec
def test_special_values(spec: Spec, value: float) -> None:
    """NaN and infinity reach what they reach in the reference."""
    for name in spec.special:
        tensors = spec.samples[1].tensors(torch.float32)
        tensors[name].view(-1)[1] = value
        outputs, expected = (forward(f, tensors, spec.samples[1].options) for f in (spec.op, spec.reference))
        for actual, reference in zip(outputs, expected, strict=True):
            assert torch.equal(kinds(actual), kinds(reference)), f"{name}={value}"

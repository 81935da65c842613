"""NaN and infinity in an input reach the same outputs as in the reference, and nothing of the other examples."""

import math

import pytest
import torch
from compare import assert_same, differentiate, forward
from specs import Spec, all_specs, case_id
from torch import Tensor


def kinds(t: Tensor) -> Tensor:
    """0 where finite, 1 and -1 where infinite, 2 where NaN."""
    return torch.where(t.isnan(), 2.0, torch.where(t.isinf(), t.sign(), torch.zeros_like(t)))


each_value = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
each_spec = pytest.mark.parametrize("spec", all_specs(), ids=case_id)


@each_value
@each_dtype
@each_spec
def test_reaches_what_it_reaches_in_the_reference(spec: Spec, dtype: torch.dtype, value: float) -> None:
    for sample in spec.samples[:2]:
        for name in spec.special:
            tensors = sample.tensors(dtype)
            tensors[name].view(-1)[1] = value
            outputs, expected = (forward(f, tensors, sample.options) for f in (spec.op, spec.reference))
            for i, pair in enumerate(zip(outputs, expected, strict=True)):
                actual, reference = map(kinds, pair)
                assert torch.equal(actual, reference), f"{spec.name} {sample} {name}={value}: output {i}"


@each_value
@each_dtype
@each_spec
def test_other_examples_keep_their_gradient(spec: Spec, dtype: torch.dtype, value: float) -> None:
    """What one example holds leaves no trace in the gradients of the others: no bit of them changes."""
    name = spec.special[0]
    for sample in [s for s in spec.samples[:2] if len(s.args[name].shape) > 1]:
        clean, spoiled = sample.tensors(dtype), sample.tensors(dtype)
        spoiled[name].view(-1)[1] = value
        _, expected = differentiate(spec.op, clean, sample.options, (name,))
        _, actual = differentiate(spec.op, spoiled, sample.options, (name,))
        assert_same([actual[name][1:]], [expected[name][1:]], f"{spec.name} {sample} {name}={value}")

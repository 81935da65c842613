"""Outputs against the float64 reference, in every dtype an operator has a kernel for."""

import numerics
import pytest
import torch
from compare import double, forward
from specs import Sample, Spec, all_specs, case_id, cases

DTYPES = {  # of activations, of weights
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 with float32 weights": (torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("spec", "sample"), cases(), ids=case_id)
def test_forward(spec: Spec, sample: Sample, dtypes: str) -> None:
    if "weights" in dtypes and not spec.mixed:
        pytest.skip("has no weights")
    tensors = sample.tensors(*DTYPES[dtypes])
    actual = forward(spec.op, tensors, sample.options)
    eager = forward(spec.reference, tensors, sample.options)
    exact = forward(spec.reference, double(tensors), sample.options)
    for i, triple in enumerate(zip(actual, eager, exact, strict=True)):
        numerics.assert_close(*triple, numerics.FORWARD, f"{spec.name} output {i}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=case_id)
@pytest.mark.parametrize("spec", all_specs(), ids=case_id)
def test_other_dtypes_are_the_references(spec: Spec, dtype: torch.dtype) -> None:
    sample = spec.samples[0]
    tensors = sample.tensors(dtype)
    actual, expected = (forward(f, tensors, sample.options) for f in (spec.op, spec.reference))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))

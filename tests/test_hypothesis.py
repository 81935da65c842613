"""Shapes and options drawn at random, forward and backward, against the float64 reference."""

import pytest
import torch
from compare import assert_matches
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from specs import Spec, all_specs, case_id


@pytest.mark.parametrize("spec", all_specs(), ids=case_id)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_shapes(spec: Spec, data: st.DataObject) -> None:
    sample = data.draw(spec.shapes)
    dtype = data.draw(st.sampled_from((torch.float32, torch.bfloat16)))
    assert_matches(spec, sample, sample.tensors(dtype), what=str(dtype))

"""Gradients: the float64 path against finite differences, the kernels against the float64 path."""

import pytest
import torch
from compare import assert_matches, assert_same, differentiate
from specs import Sample, Spec, all_specs, case_id, cases
from test_numerics import DTYPES

from bigmodel_fast import ops


@pytest.mark.parametrize(("spec", "sample"), cases(), ids=case_id)
def test_float64_against_finite_differences(spec: Spec, sample: Sample) -> None:
    tensors = sample.tensors(torch.float64)
    inputs = tuple(tensors[name].requires_grad_() for name in sample.wanted)

    def function(*values):
        return spec.op(**{**tensors, **dict(zip(sample.wanted, values, strict=True))}, **sample.options)

    if any(y.isnan().any() for y in torch.utils._pytree.tree_leaves(function(*inputs))):
        pytest.skip("the loss is NaN by definition")
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("spec", "sample"), cases(), ids=case_id)
def test_kernels_against_float64(spec: Spec, sample: Sample, dtypes: str) -> None:
    if "weights" in dtypes and not spec.mixed:
        pytest.skip("has no weights")
    assert_matches(spec, sample, sample.tensors(*DTYPES[dtypes]))


@pytest.mark.parametrize("spec", all_specs(), ids=case_id)
def test_each_argument_alone(spec: Spec) -> None:
    """The gradient of one argument does not depend on which others are asked for."""
    sample = spec.samples[1]
    tensors = sample.tensors(torch.float32)
    _, together = differentiate(spec.op, tensors, sample.options, sample.wanted)
    for name in sample.wanted:
        _, alone = differentiate(spec.op, tensors, sample.options, (name,))
        assert_same([alone[name]], [together[name]], f"{spec.name} gradient of {name}")


@pytest.mark.parametrize("op", ["linear", "mlp", "gated_mlp"])
def test_the_residual_alone(op: str) -> None:
    """Where nothing else needs a gradient, nothing is saved for one."""
    x, up, down, residual = torch.randn(40, 16), torch.randn(24, 16), torch.randn(16, 24), torch.randn(40, 16)
    call = {
        "linear": lambda r: ops.linear(x, down @ up, None, activation="gelu", residual=r),
        "mlp": lambda r: ops.mlp(x, up, None, down, None, residual=r),
        "gated_mlp": lambda r: ops.gated_mlp(x, up, up, down, residual=r),
    }[op]
    y = call(residual.requires_grad_())
    assert torch.equal(torch.autograd.grad(y, residual, y.detach())[0], y)

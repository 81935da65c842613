"""Any strides and alignment, empty tensors, and every length a vector's tail can have."""

import pytest
import torch
from compare import assert_matches
from specs import Layout, Sample, Spec, all_specs, case_id, cases
from torch import Tensor

from bigmodel_fast import ops

DTYPES = (torch.float32, torch.bfloat16)


def transposed(t: Tensor) -> Tensor:
    """The last dimension is not the contiguous one."""
    return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.dim() > 1 else t


def outer_permuted(t: Tensor) -> Tensor:
    """The dimensions before the last are in another order in memory, as heads are behind a projection."""
    return t.transpose(0, -2).contiguous().transpose(0, -2) if t.dim() > 2 else t


def padded_rows(t: Tensor) -> Tensor:
    """Rows are further apart than they are long."""
    return torch.nn.functional.pad(t, (0, 3))[..., : t.shape[-1]] if t.dim() > 0 else t


def every_second(t: Tensor) -> Tensor:
    """Elements are two apart."""
    return t.repeat_interleave(2, dim=-1)[..., ::2] if t.dim() > 0 else t


def offset(t: Tensor) -> Tensor:
    """The first element lies one element behind an aligned address."""
    return torch.cat([t.new_zeros(1), t.reshape(-1)])[1:].view(t.shape)


def expanded(t: Tensor) -> Tensor:
    """All rows are the same memory."""
    return t[:1].expand_as(t) if t.dim() > 1 else t


def scalar(t: Tensor) -> Tensor:
    """All elements are the same memory, as the gradient of a sum is."""
    return t.reshape(-1)[0].expand_as(t)


LAYOUTS = (transposed, outer_permuted, padded_rows, every_second, offset, expanded)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("spec", all_specs(), ids=case_id)
def test_strides(spec: Spec, dtype: torch.dtype, layout: Layout) -> None:
    """Of inputs and of the gradients that come back."""
    for sample in (spec.samples[0], spec.samples[1]):
        assert_matches(spec, sample, sample.tensors(dtype, layout=layout), layout=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("spec", all_specs(), ids=case_id)
def test_gradient_of_a_sum(spec: Spec, dtype: torch.dtype) -> None:
    sample = spec.samples[1]
    assert_matches(spec, sample, sample.tensors(dtype), layout=scalar)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize(("spec", "sample"), cases("empty"), ids=case_id)
def test_empty(spec: Spec, sample: Sample, dtype: torch.dtype) -> None:
    assert_matches(spec, sample, sample.tensors(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("spec", all_specs(), ids=case_id)
def test_every_tail_length(spec: Spec, dtype: torch.dtype) -> None:
    for n in range(1, 68):  # 64 is the widest block any kernel works in
        sample = spec.tail(n)
        assert_matches(spec, sample, sample.tensors(dtype), what=f"n={n}")


@pytest.mark.parametrize("op", [ops.rms_norm, lambda x, w: ops.layer_norm(x, w, w)], ids=["rms_norm", "layer_norm"])
def test_norms_larger_than_caches(op) -> None:
    """Rows that are written past the caches are the same bits as those of a few."""

    def with_gradient(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
        x = x.detach().requires_grad_()
        y = op(x, weight)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    x, dy, weight = torch.randn(8200, 768), torch.randn(8200, 768), torch.randn(768)
    for large, few in zip(with_gradient(x, dy), with_gradient(x[-9:], dy[-9:]), strict=True):
        assert torch.equal(large[-9:], few)


@pytest.mark.parametrize("dtype", DTYPES, ids=case_id)
@pytest.mark.parametrize("dim", [48, 64, 80])
def test_rotary_larger_than_caches(dim: int, dtype: torch.dtype) -> None:
    heads = -(-(25 << 20) // (512 * dim * dtype.itemsize))
    angle = torch.randn(512, dim)

    def turned(query: Tensor, angle: Tensor) -> Tensor:
        return ops.rotary(query, query[:, :1], angle.cos(), angle.sin())[0]

    query = torch.randn(1, 512, heads, dim).to(dtype).transpose(1, 2)
    assert torch.equal(turned(query, angle)[:, :, -9:], turned(query[:, :, -9:], angle[-9:]))

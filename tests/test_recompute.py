"""mlp and gated_mlp with recompute=True: the same bits, and only the inputs are kept."""

import pytest
import torch
from compare import assert_same, differentiate
from specs import Spec, all_specs, case_id

each_spec = pytest.mark.parametrize("spec", [s for s in all_specs() if s.name in ("mlp", "gated_mlp")], ids=case_id)


@each_spec
@pytest.mark.parametrize("dtypes", [(torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, torch.float32)])
def test_same_bits(spec: Spec, dtypes: tuple[torch.dtype, torch.dtype | None]) -> None:
    for sample in spec.samples:
        tensors = sample.tensors(*dtypes)
        outputs, grads = differentiate(spec.op, tensors, sample.options, sample.wanted)
        again, grads_again = differentiate(spec.op, tensors, {**sample.options, "recompute": True}, sample.wanted)
        assert_same((*again, *grads_again.values()), (*outputs, *grads.values()), f"{spec.name} {sample}")


@each_spec
def test_keeps_the_inputs_only(spec: Spec) -> None:
    sample = spec.samples[-1]
    tensors = {name: t.requires_grad_() for name, t in sample.tensors(torch.float32).items()}
    own = {t.data_ptr() for t in tensors.values()}

    def kept_elements(recompute: bool) -> int:
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            spec.op(**tensors, **sample.options, recompute=recompute)
        return sum(t.numel() for t in kept if t.data_ptr() not in own)

    assert kept_elements(recompute=True) == 0
    assert kept_elements(recompute=False) > 0

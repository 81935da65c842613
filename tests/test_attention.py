"""What attention promises beyond agreeing with its reference: dropout, lengths, repetition, large strides."""

import pytest
import torch
import torch.nn.functional as F
from compare import assert_same, differentiate

import bigmodel_fast as bmf
from bigmodel_fast.ops import attention, attention_varlen
from bigmodel_fast.ops.attention import reference

QKV = ("query", "key", "value")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name in QKV}


def dropped_weights(heads: int, length: int, p: float, seed: int) -> torch.Tensor:
    """keep / (1 - p) for each weight, [1, heads, length, length]: all scores are equal, and the values are one-hot."""
    torch.manual_seed(seed)
    same, one_hot = torch.zeros(1, heads, length, length), torch.eye(length).expand(1, heads, length, length)
    return attention(same, same, one_hot, dropout_p=p) * length


@pytest.mark.parametrize("isa", bmf._library.supported_cpu_isas())
def test_dropout_keeps_what_it_says(isa: str) -> None:
    bmf.cpu_isa(isa)
    weights = dropped_weights(4, 200, 0.3, seed=5)
    kept = weights > 0
    assert torch.allclose(weights[kept], torch.tensor(1 / 0.7), rtol=1e-5)
    share = kept.double().mean().item()
    assert abs(share - 0.7) < 5 * (0.3 * 0.7 / kept.numel()) ** 0.5
    for dim in (1, 2, 3):  # neighbours in a dimension are as if independent
        a, b = kept.narrow(dim, 1, kept.shape[dim] - 1), kept.narrow(dim, 0, kept.shape[dim] - 1)
        both = (a & b).double().mean().item()
        assert abs(both - 0.49) < 5 * (0.49 * 0.51 / a.numel()) ** 0.5
    bmf.cpu_isa("generic")
    assert torch.equal(dropped_weights(4, 200, 0.3, seed=5) > 0, kept), f"{isa} drops others than generic"
    assert not torch.equal(dropped_weights(4, 200, 0.3, seed=6) > 0, kept)


@each_dtype
@pytest.mark.parametrize("queries", [150, 3])
@pytest.mark.parametrize("options", [{}, {"is_causal": True, "softcap": 3.0}, {"window": 20}], ids=str)
def test_dropout_gradient_drops_the_same(options: dict, queries: int, dtype: torch.dtype) -> None:
    """Against the formula in float64, with the mask that the kernel is seen to have used."""
    length, p = 150, 0.2
    tensors = draw(1, 2, length, 64, dtype=dtype)
    tensors["query"] = tensors["query"][:, :, :queries]

    def dropped(query, key, value):
        torch.manual_seed(3)
        return attention(query, key, value, dropout_p=p, **options)

    torch.manual_seed(3)
    same = torch.zeros(1, 2, length, length)
    seen = attention(same[:, :, :queries], same, torch.eye(length).expand_as(same), dropout_p=p) > 0

    def exact(query, key, value):
        eye = torch.eye(length, dtype=query.dtype).expand(1, 2, length, length)
        weights = reference(query, key, eye, **options)
        return (weights * seen / (1 - p)) @ value

    outputs, grads = differentiate(dropped, tensors, {}, QKV)
    expected, expected_grads = differentiate(exact, {n: t.double() for n, t in tensors.items()}, {}, QKV)
    tolerance = 1e-5 if dtype is torch.float32 else 3e-2
    for actual, want in zip((*outputs, *grads.values()), (*expected, *expected_grads.values()), strict=True):
        assert (actual.double() - want).abs().max() <= tolerance * want.abs().max()


def test_dropping_everything_and_nothing() -> None:
    tensors = draw(1, 2, 9, 16)
    assert torch.equal(attention(**tensors, dropout_p=1.0), torch.zeros(1, 2, 9, 16))
    assert torch.equal(attention(**tensors, dropout_p=0.0), attention(**tensors))


def test_is_torchs_function() -> None:
    """The same numbers as SDPA within rounding, where both mean the same."""
    tensors = draw(2, 4, 50, 32)
    mask = torch.rand(2, 1, 50, 50, generator=torch.Generator().manual_seed(1)) < 0.8
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 0.3}):
        torch.testing.assert_close(
            attention(**tensors, **options), F.scaled_dot_product_attention(**tensors, **options)
        )


@each_dtype
def test_lengths_are_as_if_cut(dtype: torch.dtype) -> None:
    """Keys behind a length change nothing, whatever they hold, and packing the rest gives the same rows."""
    tensors = draw(3, 2, 40, 32, dtype=dtype)
    lengths = [40, 17, 1]
    cut = [{n: t[i : i + 1, :, :m] for n, t in tensors.items()} for i, m in enumerate(lengths)]
    for i, m in enumerate(lengths):
        for name in ("key", "value"):
            tensors[name][i, :, m:] = float("nan")
    outputs, grads = differentiate(attention, tensors, {"key_lengths": torch.tensor(lengths)}, QKV)
    packed = {n: torch.cat([c[n][0].transpose(0, 1) for c in cut]) for n in QKV}
    bounds = torch.tensor([0, 40, 57, 58])
    together = attention_varlen(**packed, cu_seqlens_q=bounds, cu_seqlens_k=bounds)
    for i, m in enumerate(lengths):
        alone = attention(**cut[i])
        torch.testing.assert_close(outputs[0][i : i + 1, :, :m], alone)
        torch.testing.assert_close(together[bounds[i] : bounds[i + 1]].transpose(0, 1), alone[0])
        assert all(g[i, :, m:].eq(0).all() for n, g in grads.items() if n != "query")
        assert all(g.isfinite().all() for g in grads.values())


def test_no_sequences() -> None:
    empty, bounds = torch.zeros(0, 2, 8), torch.zeros(1, dtype=torch.int32)
    assert attention_varlen(empty, empty, empty, bounds, bounds).shape == (0, 2, 8)


@pytest.mark.slow
@each_dtype
def test_a_thousand_repetitions_are_bit_equal(dtype: torch.dtype) -> None:
    torch.set_num_threads(3)
    tensors = draw(1, 2, 150, 32, dtype=dtype)
    call = (attention, tensors, {"is_causal": True}, QKV)
    outputs, grads = differentiate(*call)
    for _ in range(1000):
        again, grads_again = differentiate(*call)
        assert_same((*again, *grads_again.values()), (*outputs, *grads.values()), "attention")


def test_offsets_beyond_32_bits() -> None:
    """Rows, heads and batches more than 2^31 elements apart; the memory between them is never touched."""
    apart = (1 << 31) + 64
    storage = torch.empty(2 * apart + 4096, dtype=torch.bfloat16)  # pages that are not touched cost nothing
    small = draw(2, 2, 3, 16, dtype=torch.bfloat16)
    for strides in ((apart, 48, 16, 1), (96, apart, 16, 1), (96, 48, apart, 1)):
        spread = {}
        for offset, (name, t) in enumerate(small.items()):
            spread[name] = storage.as_strided(t[:, :, :2].shape, strides, offset * 1024).copy_(t[:, :, :2])
        near = {name: t[:, :, :2] for name, t in small.items()}
        outputs, grads = differentiate(attention, spread, {}, QKV)
        expected, expected_grads = differentiate(attention, near, {}, QKV)
        assert_same((*outputs, *grads.values()), (*expected, *expected_grads.values()), f"strides {strides}")

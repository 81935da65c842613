"""What the benchmarks do on a GPU, as far as it can be told without one: cases, providers, work and exact results."""

from dataclasses import replace

import pytest
import torch
from bigmodel_fast.benchmarks import (
    bench_attention,
    bench_attention_varlen,
    bench_gpt,
    bench_linear_cross_entropy,
    engine,
)
from bigmodel_fast.benchmarks import devices as benchmark_devices
from bigmodel_fast.benchmarks.cases import COMPILE, EAGER, OURS, Case, OpBenchmark, normal
from bigmodel_fast.benchmarks.devices import Cpu
from torch._subclasses.fake_tensor import FakeTensorMode

from bigmodel_fast import benchmarks
from bigmodel_fast.cli import bench
from bigmodel_fast.ops.attention import reference

NAMES = benchmarks.names()
OPERATORS = [name for name in NAMES if isinstance(benchmarks.load(name), OpBenchmark)]


class SeemingGpu(Cpu):
    """The CPU under the name of a GPU: what is chosen by the device's type is a GPU's."""

    def __init__(self) -> None:
        super().__init__(torch.device("cuda"))


def draw(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).double().requires_grad_() for n, s in shapes.items()}


def assert_same_with_gradients(one, other, tensors: dict[str, torch.Tensor]) -> None:
    made = [function(**tensors) for function in (one, other)]
    torch.testing.assert_close(*made)
    upstream = torch.randn_like(made[0])
    wanted = [t for t in tensors.values() if t.requires_grad]
    torch.testing.assert_close(*(torch.autograd.grad(y, wanted, upstream) for y in made))


# ---- cases and providers ----


@pytest.mark.parametrize("name", OPERATORS)
def test_every_case_for_a_gpu_is_accepted_and_counted(name: str) -> None:
    """By ours and eager, on tensors that only say that they lie on a GPU; there is no autocast without one."""
    if name == "attention_varlen":
        pytest.skip("eager reads lengths, which fake tensors do not have")
    benchmark = benchmarks.load(name)
    assert benchmark.cuda_cases
    for case in benchmark.cuda_cases:
        with FakeTensorMode(allow_non_fake_inputs=True):
            inputs = {n: t.to("cuda") for n, t in benchmark.inputs(case, "fp32", torch.device("cpu")).items()}
            for provider in (OURS, EAGER):
                outputs = benchmark.task(provider, case, inputs, "fp32").forward()
                assert all(t.device.type == "cuda" for t in outputs)
        if "key_lengths" not in case.args:  # which are read
            work = benchmark.work(case, inputs)
            assert work["both"] == work["forward"] + work["backward"] > 0


def test_a_gpu_has_its_own_cases_and_providers(monkeypatch) -> None:
    monkeypatch.setattr(engine, "cannot_compile", lambda device: None)
    attention, device = benchmarks.load("attention"), SeemingGpu()
    assert [case for case, _ in engine.Selection().runs(attention, device)] == list(attention.cuda_cases)
    case = attention.cuda_cases[0]
    found = engine.Selection().providers_of(attention, case, "bf16", device)
    assert found == [EAGER, OURS, "eager flash", "eager cudnn"]
    assert engine.Selection().providers_of(attention, attention.cases[0], "bf16", benchmarks_cpu()) == [EAGER, OURS]
    gpt = benchmarks.load("gpt")
    found = engine.Selection().providers_of(gpt, gpt.cuda_cases[0], "bf16", device)
    assert {OURS, EAGER, COMPILE, "bigmodel_fast graph", "eager cudnn", "compile cudnn"} == set(found)
    quick = engine.Selection(quick=True).providers_of(gpt, gpt.cuda_cases[0], "bf16", device)
    assert not [name for name in quick if name.startswith(COMPILE)]


def benchmarks_cpu() -> Cpu:
    return Cpu(torch.device("cpu"))


def test_list_shows_what_a_gpu_would_run(capsys, monkeypatch) -> None:
    monkeypatch.setattr(benchmark_devices, "open_device", lambda name: SeemingGpu())
    assert bench.run(["attention", "--list", "--device", "cuda", "--providers", "flex,eager"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(benchmarks.load("attention").cuda_cases)
    assert [line for line in lines if "window" in line] == [
        "attention: causal 1x16x8192x128 window 1024 (bf16; eager, flex)"
    ]
    monkeypatch.undo()
    assert bench.run(["attention", "--list", "--device", "cpu", "--providers", "flex"]) == 2


def test_what_has_no_exact_result_is_not_timed() -> None:
    """Too little memory for float64, say: the providers fail with the reason, and the next case is run."""
    good, bad = (Case(name, {"x": normal(8)}, dtypes=("fp32",)) for name in ("good", "bad"))

    def exact(x: torch.Tensor) -> torch.Tensor:
        if exact.fail:
            exact.fail = False
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB\nand more")
        return x * x

    exact.fail = True
    benchmark = OpBenchmark(
        name="square",
        unit="FLOP",
        functions={EAGER: lambda x: x * x, OURS: lambda x: x * x},
        reference=exact,
        count=lambda x: (8.0, 16.0),
        cases=(bad, good),
        cuda_cases=(),
        tiny=good,
    )
    budget = engine.Budget(seconds=0.0, least=3, most=3, warm_ups=1)
    rows = list(engine.measure(benchmark, benchmarks_cpu(), engine.Selection(memory=False), budget))
    failed = {row.status for row in rows if row.case == "bad"}
    assert failed == {"failed: no exact result (CUDA out of memory. Tried to allocate 40 GiB)"}
    assert {row.status for row in rows if row.case == "good"} == {"ok"}
    assert all(row.seconds is None for row in rows if row.case == "bad")


def test_a_provider_that_fails_while_its_memory_is_measured_does_not_stop_the_others(monkeypatch) -> None:
    device = benchmarks_cpu()

    def extra(benchmark, case, provider, dtype, inputs):
        if provider == OURS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 7

    monkeypatch.setattr(device, "extra_memory", extra)
    rms_norm = benchmarks.load("rms_norm")
    budget = engine.Budget(seconds=0.0, least=3, most=3, warm_ups=1)
    tiny = replace(rms_norm, cases=(rms_norm.tiny,))
    rows = list(engine.measure(tiny, device, engine.Selection(providers=[OURS, EAGER]), budget))
    assert {r.status for r in rows if r.provider == OURS} == {"failed: CUDA out of memory"}
    assert {r.extra_bytes for r in rows if r.provider == EAGER} == {7}


# ---- work ----


@pytest.mark.parametrize("window", [None, (3, 0), (2, 5)])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (4, 9), (9, 4)])
def test_only_pairs_that_may_meet_are_counted(queries: int, keys: int, is_causal: bool, window) -> None:
    mask = bench_attention.allowed_mask(
        queries, keys, is_causal=is_causal, window=window, key_lengths=None, device=torch.device("cpu")
    )
    expected = queries * keys if mask is None else int(mask.sum())
    assert bench_attention.pairs(queries, keys, is_causal, window) == expected


# ---- providers and exact results ----

QKV = {"query": (2, 4, 9, 8), "key": (2, 2, 9, 8), "value": (2, 2, 9, 8)}
SLOPES = 2.0 ** -torch.arange(1.0, 5.0)


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"is_causal": True, "window": (3, 0)},
        {"window": (2, 1)},
        {"is_causal": True, "alibi_slopes": SLOPES},
        {"key_lengths": torch.tensor([4, 9])},
    ],
    ids=lambda options: " ".join(options),
)
def test_attention_by_other_means_is_the_same(options: dict) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def expected(**tensors):
        return reference(**tensors, enable_gqa=True, **options)

    def others():
        yield bench_attention.by_head
        yield bench_attention.sdpa
        if "key_lengths" not in options:
            yield lambda **call: bench_attention.flex(**call, call=flex_attention)

    tensors = draw(**QKV)
    with torch.no_grad():  # on the CPU, FlexAttention has no backward
        for function in others():
            made = function(**{n: t.detach() for n, t in tensors.items()}, enable_gqa=True, **options)
            torch.testing.assert_close(made, expected(**tensors))
    assert_same_with_gradients(lambda **t: bench_attention.by_head(**t, enable_gqa=True, **options), expected, tensors)


def test_packed_attention_by_other_means_is_the_same() -> None:
    bounds = torch.tensor([0, 3, 4, 9])
    call = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "is_causal": True}
    exact = bench_attention_varlen.ops.attention_varlen

    def by_sequence(**tensors):
        return bench_attention_varlen.reference(**tensors, **call)

    tensors = draw(query=(9, 2, 8), key=(9, 2, 8), value=(9, 2, 8))
    assert_same_with_gradients(by_sequence, lambda **t: exact(**t, **call), tensors)


def test_the_exact_loss_of_many_tokens_is_made_by_rows(monkeypatch) -> None:
    monkeypatch.setattr(bench_linear_cross_entropy, "ROWS", 4)
    target = torch.randint(11, (10,), generator=torch.Generator().manual_seed(0))
    assert_same_with_gradients(
        lambda **t: bench_linear_cross_entropy.by_rows(**t, target=target),
        lambda **t: bench_linear_cross_entropy.reference(**t, target=target),
        draw(x=(10, 5), weight=(11, 5)),
    )


def test_the_exact_step_of_many_sequences_is_made_by_some(monkeypatch) -> None:
    gpt = benchmarks.load("gpt")
    case = bench_gpt.case("some", 5, 8, {"vocab_size": 67, "width": 16, "layers": 1, "heads": 2})
    inputs = gpt.inputs(case, "fp32", torch.device("cpu"))
    whole = gpt.exact(case, inputs)
    monkeypatch.setattr(bench_gpt, "EXACT_TOKENS", 16)  # two sequences
    torch.testing.assert_close(gpt.exact(case, inputs), whole)

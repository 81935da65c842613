"""Optimizers: torch's trajectories, states that go both ways, clipping, fallbacks."""

import copy
import itertools
import math

import pytest
import torch

import bigmodel_fast as bmf
from bigmodel_fast import _C, optim

SHAPES = [(3, 5), (40_000,), (1,), (7, 11, 13), (0,)]
ADAMW = [{}, {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-6}, {"maximize": True}]
SGDS = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.5, "dampening": 0.3},
]
CASES = [("AdamW", kw) for kw in ADAMW] + [("SGD", kw) for kw in SGDS]


@pytest.fixture(params=_C.supported_cpu_isas(), autouse=True)
def isa(request):
    before = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield
    _C.set_cpu_isa(before)


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]


def draw_gradients(params, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ten_steps_are_torchs(name: str, options: dict, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    a = getattr(optim, name)(ours, lr=0.01, **options)
    b = getattr(torch.optim, name)(theirs, lr=0.01, foreach=False, **options)
    bmf.explain(reset=True)
    for step in range(10):
        for params, optimizer in ((ours, a), (theirs, b)):
            draw_gradients(params, step)
            optimizer.step()
    assert {c.path for c in bmf.explain(reset=True).calls} == {"native"}
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.05}
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, **tolerance)


@pytest.mark.parametrize(("name", "options"), [("AdamW", {}), ("SGD", {"momentum": 0.9})])
def test_states_go_both_ways(name: str, options: dict) -> None:
    params = {"ours": parameters(), "theirs": parameters()}
    a = getattr(optim, name)(params["ours"], lr=0.01, **options)
    b = getattr(torch.optim, name)(params["theirs"], lr=0.01, **options)
    for step in range(3):
        for ps, optimizer in ((params["ours"], a), (params["theirs"], b)):
            draw_gradients(ps, step)
            optimizer.step()
    state_a, state_b = copy.deepcopy(a.state_dict()), copy.deepcopy(b.state_dict())
    assert state_a["param_groups"] == state_b["param_groups"]
    assert {k: set(v) for k, v in state_a["state"].items()} == {k: set(v) for k, v in state_b["state"].items()}
    a.load_state_dict(state_b)
    b.load_state_dict(state_a)
    for ps, optimizer in ((params["ours"], a), (params["theirs"], b)):
        draw_gradients(ps, 3)
        optimizer.step()
    for p, q in zip(params["ours"], params["theirs"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_autograd_sees_that_parameters_changed(name: str) -> None:
    """A graph that has saved them must not be walked backward any more, as with torch's own steps."""
    p = torch.nn.Parameter(torch.ones(3, 3))
    loss = (p @ torch.ones(3, 3) @ p).sum()
    p.grad = torch.ones(3, 3)
    getattr(optim, name)([p], lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_groups_without_a_gradient_are_left_alone(name: str) -> None:
    frozen, trained = parameters()[:2]
    optimizer = getattr(optim, name)([{"params": [frozen]}, {"params": [trained]}], lr=0.1)
    before = frozen.clone(), trained.clone()
    optimizer.step()
    assert optim.clip_grad_norm_([frozen, trained], 1.0).item() == 0
    if name == "AdamW":
        assert optimizer.clip_grad_norm(1.0).item() == 0
    assert torch.equal(trained, before[1])
    trained.grad = torch.ones_like(trained)
    optimizer.step()
    assert torch.equal(frozen, before[0])
    assert not torch.equal(trained, before[1])


def test_a_copy_goes_on_as_the_optimizer_does() -> None:
    params = parameters(torch.bfloat16)
    optimizer = optim.AdamW(params, lr=0.01, stochastic_rounding=True)
    draw_gradients(params, 0)
    optimizer.step()
    draw_gradients(params, 1)
    optimizer.clip_grad_norm(0.1)
    copied = copy.deepcopy(optimizer)
    for p, q in zip(params, copied.param_groups[0]["params"], strict=True):
        q.grad = p.grad.clone()  # which copies do not take along
    optimizer.step()
    copied.step()
    assert copied.stochastic_rounding
    for p, q in zip(params, copied.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)


def test_groups_schedulers_and_missing_gradients() -> None:
    ours, theirs = parameters(), parameters()
    results = []
    for module, params in ((optim, ours), (torch.optim, theirs)):
        groups = [{"params": params[:2], "weight_decay": 0.5}, {"params": params[2:], "lr": 0.1}]
        optimizer = module.AdamW(groups, lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        for step in range(4):
            draw_gradients(params, step)
            if step < 2:
                params[1].grad = None
            optimizer.step()
            schedule.step()
        results.append(params)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_torchs(dtype: torch.dtype, max_norm: float) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    for params in (ours, theirs):
        draw_gradients(params, 1)
        params[0].grad = None
    norm = optim.clip_grad_norm_(ours, max_norm)
    exact = math.sqrt(sum(p.grad.double().square().sum() for p in theirs if p.grad is not None))
    assert norm.item() == pytest.approx(exact, rel=1e-5)
    torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    for p, q in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-2 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # float64: by torch
def test_clipping_within_the_step_is_clipping_before_it(dtype: torch.dtype, max_norm: float) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    a, b = optim.AdamW(ours, lr=0.01), torch.optim.AdamW(theirs, lr=0.01)
    for step in range(3):
        for params in (ours, theirs):
            draw_gradients(params, step)
        before = ours[1].grad.clone()
        norm = a.clip_grad_norm(max_norm)
        assert torch.equal(ours[1].grad, before) == (dtype is torch.float32 or max_norm > 1)
        assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, max_norm).item(), rel=1e-5)
        a.step()
        b.step()
    for params, optimizer in ((ours, a), (theirs, b)):  # a step without clipping: the factor was used up
        draw_gradients(params, 3)
        optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_clipping_that_no_step_used_is_forgotten_with_its_gradients() -> None:
    ours, theirs = parameters(), parameters()
    a, b = optim.AdamW(ours, lr=0.01), optim.AdamW(theirs, lr=0.01)
    draw_gradients(ours, 0)
    a.clip_grad_norm(1e-3)
    a.zero_grad()
    for params, optimizer in ((ours, a), (theirs, b)):
        draw_gradients(params, 1)
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_stochastic_rounding_keeps_what_rounding_to_nearest_loses() -> None:
    def train(dtype: torch.dtype, **options: bool) -> torch.Tensor:
        p = torch.nn.Parameter(torch.ones(40_001, dtype=dtype))
        optimizer = optim.AdamW([p], lr=1e-4, weight_decay=0.0, **options)
        for _ in range(20):  # steps of 1e-4, where neighbours of 1 are 4e-3 and 8e-3 away
            p.grad = torch.full_like(p, 0.5)
            optimizer.step()
        return p.detach().float()

    exact, nearest, stochastic = (
        train(torch.float32),
        train(torch.bfloat16),
        train(torch.bfloat16, stochastic_rounding=True),
    )
    assert torch.equal(nearest, torch.ones_like(nearest))
    assert abs(exact.mean() - (1 - 20e-4)) < 1e-5
    assert abs(stochastic.mean() - exact.mean()) < 1e-4
    assert torch.equal(train(torch.float32, stochastic_rounding=True), exact)


def test_stochastic_rounding_repeats_whatever_the_threads_and_the_instruction_set() -> None:
    def train(threads: int) -> list[torch.Tensor]:
        torch.set_num_threads(threads)
        params = parameters(torch.bfloat16)
        optimizer = optim.AdamW(params, lr=0.01, stochastic_rounding=True)
        for step in range(3):
            draw_gradients(params, step)
            optimizer.step()
        return [t for p in params for t in (p.detach(), *(s for k, s in optimizer.state[p].items() if k != "step"))]

    threads = torch.get_num_threads()
    try:
        first, again = train(1), train(3)
        assert all(map(torch.equal, first, again))
        _C.set_cpu_isa("generic")
        for a, b in zip(first, train(2), strict=True):  # without fused multiply-adds a few sums differ in the last bit
            assert (a != b).sum() <= a.numel() / 100
    finally:
        torch.set_num_threads(threads)


def test_stochastic_rounding_keeps_infinity_and_nan() -> None:
    p = torch.nn.Parameter(torch.tensor([math.inf, -math.inf, math.nan, 1.0], dtype=torch.bfloat16))
    p.grad = torch.tensor([0.0, 0.0, 0.0, math.nan], dtype=torch.bfloat16)
    optim.AdamW([p], lr=0.01, stochastic_rounding=True).step()
    assert p[0] == math.inf
    assert p[1] == -math.inf
    assert p[2:].isnan().all()


def test_stochastic_rounding_is_never_left_out_silently() -> None:
    params = parameters(torch.bfloat16)
    draw_gradients(params, 0)
    with pytest.raises(NotImplementedError, match="amsgrad"):
        optim.AdamW(params, amsgrad=True, stochastic_rounding=True).step()


def test_a_norm_that_is_not_finite_is_an_error_if_asked_for() -> None:
    params = parameters()
    draw_gradients(params, 1)
    params[1].grad[7] = math.inf
    with pytest.raises(RuntimeError, match="norm of the gradients is inf"):
        optim.clip_grad_norm_(params, 1.0, error_if_nonfinite=True)
    assert params[1].grad[8].isfinite()


def test_the_norm_does_not_depend_on_the_threads() -> None:
    params = parameters()
    draw_gradients(params, 1)
    before, norms = torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norms.add(torch.ops.bigmodel_fast.grad_norm([p.grad for p in params]))
    finally:
        torch.set_num_threads(before)
    assert len(norms) == 1


@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [(torch.float64, {}, "no kernel for torch.float64"), (torch.float32, {"amsgrad": True}, "no kernel for amsgrad")],
)
def test_what_no_kernel_takes_goes_to_torch_and_is_told(dtype: torch.dtype, options: dict, reason: str) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    bmf.explain(reset=True)
    for module, params in ((optim, ours), (torch.optim, theirs)):
        optimizer = module.AdamW(params, lr=0.01, **options)
        for step in range(3):
            draw_gradients(params, step)
            optimizer.step()
    assert [(c.op, c.path, c.reason) for c in bmf.explain(reset=True).calls] == [("AdamW", "reference", reason)]
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_the_schedule_rises_then_falls_to_its_floor() -> None:
    factors = [optim.warmup_cosine(s, 100, 10, 0.1) for s in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert factors[100] == pytest.approx(0.1)

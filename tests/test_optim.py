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

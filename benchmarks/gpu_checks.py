"""What is claimed of the operators on a GPU beyond their numbers, each as a check that fails if it is not so: paths,
CUDA graphs, torch.compile, streams, devices, waiting for the device, dropout, 64-bit offsets, and the same bits each
time. A check returns what there is to say, and raises if it fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import bigmodel_fast as bmf
from bigmodel_fast import ops, optim
from bigmodel_fast.models import GPT

from . import bench_gpt, engine, load, names
from .cases import DTYPES, EAGER, OURS, Case, OpBenchmark, Results

Check = tuple[str, Callable[[], Any]]
REPEATS = 20  # of a call whose bits must not change
STEPS = 4  # of a training step that is compared


class Skip(Exception):
    """A check that cannot be made here; says why."""


def operators() -> Iterator[OpBenchmark]:
    for name in names():
        if isinstance(benchmark := load(name), OpBenchmark):
            yield benchmark


def same(found: Results, expected: Results, what: str) -> None:
    """The same bits, or AssertionError naming the first tensor that differs, and by how much."""
    assert found.keys() == expected.keys(), f"{what}: {sorted(found)} in place of {sorted(expected)}"
    for name, e in expected.items():
        a = found[name]
        if not torch.equal(a, e):
            off = (a.double() - e.double()).abs().max().item()
            raise AssertionError(f"{what}: {name} differs in {int((a != e).sum())} elements, by up to {off:.2e}")


def copied(found: Results) -> Results:
    return {name: t.detach().clone() for name, t in found.items()}


def facts(device: torch.device) -> Iterator[Check]:
    for benchmark in operators():
        yield f"{benchmark.name}: takes its kernel", partial(path, benchmark, device)
    for benchmark in operators():
        yield f"{benchmark.name}: torch.compile(fullgraph=True)", partial(compiled, benchmark, device)
    for benchmark in operators():
        yield f"{benchmark.name}: CUDA graph, replayed on other inputs", partial(graphed, benchmark, device)
    for layout in ("gpt2", "modern"):
        yield f"GPT {layout}: forward and backward as a CUDA graph", partial(graphed_pass, layout, device)
        yield f"GPT {layout}: a whole step as a CUDA graph", partial(graphed_step, layout, device)
        yield f"GPT {layout}: torch.compile(fullgraph=True)", partial(compiled_gpt, layout, device)
        yield f"GPT {layout}: a step does not wait for the device", partial(no_waiting, layout, device)
    yield "optim.AdamW: three steps against float64", partial(optimizer, device)
    yield "optim.clip_grad_norm_: against float64", partial(clipping, device)
    for benchmark in operators():
        yield f"{benchmark.name}: on another stream", partial(on_a_stream, benchmark, device)
    for benchmark in operators():
        yield f"{benchmark.name}: on a device that is not the current one", partial(elsewhere, benchmark)
    yield "attention: dropout makes the choices of the CPU", partial(dropout, device)
    yield "rms_norm, cross_entropy: more than 2^31 elements", partial(far, device)


def results(benchmark: OpBenchmark, device: torch.device, dtype: str = "bf16", case: Case | None = None) -> Results:
    case = case or benchmark.tiny
    return copied(benchmark.task(OURS, case, benchmark.inputs(case, dtype, device), dtype).results())


def path(benchmark: OpBenchmark, device: torch.device) -> str:
    """Of operators that have a kernel for GPUs, each call must take it."""
    from bigmodel_fast.ops._triton import PUBLIC

    bmf.explain(reset=True)
    for dtype in benchmark.tiny.dtypes:
        results(benchmark, device, dtype)
    calls = [call for call in bmf.explain(reset=True).calls if call.op == benchmark.name]
    taken = {call.path for call in calls}
    expected = {"native"} if device.type == "cpu" else {"triton" if benchmark.name in PUBLIC else "reference"}
    assert taken == expected, f"took {taken}, expected {expected}: {[call.reason for call in calls]}"
    return ", ".join(sorted(taken))


def compiled(benchmark: OpBenchmark, device: torch.device) -> None:
    torch._dynamo.reset()
    inputs = benchmark.inputs(benchmark.tiny, "bf16", device)
    task = benchmark.task(OURS, benchmark.tiny, inputs, "bf16")
    expected = copied(task.results())
    task.function = torch.compile(task.function, fullgraph=True, dynamic=False)
    found = copied(task.results())
    bounded(found, expected, benchmark.exact(benchmark.tiny, inputs), "bf16")


def near(found: Results, expected: Results, exact: Results, dtype: str) -> str:
    """The same bits, or at least no further from the exact results: cuBLAS may choose other products in a graph."""
    try:
        same(found, expected, "found")
    except AssertionError as error:
        bounded(found, expected, exact, dtype)
        return f"within bounds, but other bits: {error}"
    return "the same bits"


def bounded(found: Results, expected: Results, exact: Results, dtype: str) -> None:
    """`found` is no further from the exact results than `expected` is, within what the engine calls wrong."""
    verdict = engine.verdict(engine.errors(found, exact), engine.errors(expected, exact), dtype)
    assert verdict == "ok", verdict


def graphed(benchmark: OpBenchmark, device: torch.device) -> str:
    """Recorded on one set of inputs, replayed on another: what the graph gives is what a call gives."""
    inputs = benchmark.inputs(benchmark.tiny, "bf16", device)
    task = benchmark.task(OURS, benchmark.tiny, inputs, "bf16")
    graph, found = record(task.results)
    for name in task.wanted:
        task.leaves[name].data.mul_(0.75)
    graph.replay()
    replayed, expected = copied(found), copied(task.results())
    return near(replayed, expected, benchmark.exact(benchmark.tiny, task.leaves), "bf16")


def record(function: Callable[[], Results]) -> tuple[torch.cuda.CUDAGraph, Results]:
    """A CUDA graph of a call, warmed up on a stream of its own, and the tensors that a replay fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()
    return graph, found


def gpt_case(layout: str) -> Case:
    """Large enough for several tiles of everything, small enough for a moment."""
    config = {"vocab_size": 5003, "width": 256, "layers": 2, "heads": 4, "layout": layout}
    return bench_gpt.case(f"{layout} for checks", 4, 256, config)


def gpt(case: Case, device: torch.device) -> tuple[GPT, bench_gpt.Inputs]:
    inputs = bench_gpt.make_inputs(case, device)
    model = GPT(case.options["config"]).to(device)
    model.load_state_dict(inputs.weights)
    return model, inputs


def gradients(model: GPT, batch: tuple[Tensor, Tensor], run: Callable) -> Results:
    return bench_gpt.results_of(model, batch, "bf16", run)


def graphed_pass(layout: str, device: torch.device) -> str:
    """Recorded with the second batch, replayed with the first."""
    case = gpt_case(layout)
    model, inputs = gpt(case, device)
    expected = gradients(model, inputs.batches[0], bench_gpt.loss_and_gradients)
    run = bench_gpt.GraphedPass()
    gradients(model, inputs.batches[1], run)
    return near(gradients(model, inputs.batches[0], run), expected, bench_gpt.exact(case, inputs), "bf16")


def graphed_step(layout: str, device: torch.device) -> str:
    """Forward, backward, clipping and AdamW in one graph; AdamW must be capturable for that, which is torch's step."""
    case = gpt_case(layout)

    def steps() -> tuple[GPT, Callable[[], Results]]:
        model, inputs = gpt(case, device)
        updates = optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)

        def step() -> Results:
            updates.zero_grad(set_to_none=False)  # gradients stay where they are: clipping keeps their addresses
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(*inputs.batches[0])
            loss.backward()
            norm = optim.clip_grad_norm_(model.parameters(), 1.0)
            updates.step()
            return {"loss": loss.detach(), "norm": norm}

        return model, step

    plain, one_step = steps()
    recorded, step = steps()
    graph, found = record(step)
    for _ in range(3):  # as the warm-up did
        one_step()
    for _ in range(STEPS):
        graph.replay()
        replayed, expected = copied(found), copied(one_step())
        torch.testing.assert_close(replayed, expected, rtol=1e-3, atol=0)
    pairs = list(zip(recorded.parameters(), plain.parameters(), strict=True))
    for a, e in pairs:
        torch.testing.assert_close(a, e, rtol=1e-2, atol=1e-3)
    equal = sum(torch.equal(a, e) for a, e in pairs)
    return f"after {STEPS} steps {equal} of {len(pairs)} parameters have the same bits"


def compiled_gpt(layout: str, device: torch.device) -> None:
    torch._dynamo.reset()
    case = gpt_case(layout)
    model, inputs = gpt(case, device)
    expected = gradients(model, inputs.batches[0], bench_gpt.loss_and_gradients)
    model.compile(fullgraph=True, dynamic=False)
    found = gradients(model, inputs.batches[0], bench_gpt.loss_and_gradients)
    bounded(found, expected, bench_gpt.exact(case, inputs), "bf16")


def no_waiting(layout: str, device: torch.device) -> None:
    model, inputs = gpt(gpt_case(layout), device)
    updates = optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        bench_gpt.loss_and_gradients(model, *inputs.batches[0], "bf16")
        optim.clip_grad_norm_(model.parameters(), 1.0)
        updates.step()

    for _ in range(3):
        step()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def optimizer(device: torch.device) -> None:
    adamw = load("adamw")
    case = adamw.case("gpt 11M, 76 tensors")
    inputs = adamw.inputs(case, "fp32", device)
    exact = adamw.exact(case, inputs)
    found, eager = (adamw.task(p, case, inputs, "fp32").results() for p in (OURS, EAGER))
    bounded(found, eager, exact, "fp32")


def clipping(device: torch.device) -> None:
    generator = torch.Generator(device).manual_seed(0)

    def parameters() -> list[Tensor]:
        made = [torch.zeros(n, device=device, dtype=t) for n in (1, 3000, 100_003) for t in DTYPES.values()]
        generator.manual_seed(0)
        for p in made:
            p.grad = torch.randn(p.shape, generator=generator, device=device).to(p.dtype)
        return made

    for most in (0.5, 1e9):
        clipped = parameters()
        before = [p.grad.clone() for p in clipped if p.grad is not None]
        norm = optim.clip_grad_norm_(clipped, most)
        expected = torch.stack([g.double().square().sum() for g in before]).sum().sqrt()
        torch.testing.assert_close(norm.double(), expected.to(norm.device), rtol=1e-5, atol=0)
        for p, g in zip(clipped, before, strict=True):
            torch.testing.assert_close(p.grad, (g.double() * min(1.0, most / expected.item())).to(g.dtype))


def on_a_stream(benchmark: OpBenchmark, device: torch.device) -> None:
    expected = results(benchmark, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = results(benchmark, device)
    torch.cuda.current_stream().wait_stream(stream)
    same(found, expected, "on another stream")


def elsewhere(benchmark: OpBenchmark) -> None:
    if torch.cuda.device_count() < 2:
        raise Skip("there is one GPU only")
    here = torch.device("cuda", 0)
    there = {n: t.to("cuda:1") for n, t in benchmark.inputs(benchmark.tiny, "bf16", here).items()}
    with torch.cuda.device(0):
        found = copied(benchmark.task(OURS, benchmark.tiny, there, "bf16").results())
    assert all(t.device == torch.device("cuda", 1) for t in found.values())
    exact = benchmark.exact(benchmark.tiny, there)
    bounded(found, copied(benchmark.task(EAGER, benchmark.tiny, there, "bf16").results()), exact, "bf16")


def dropout(device: torch.device) -> None:
    """The raw operator with the same seed on both: weights that one drops and the other keeps would be far off."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 300, 64, generator=generator) for _ in range(3))
    seed = torch.tensor([987654321987654])
    options = (0.125, 0.0, 1 << 40, 0, 0.25)
    call = torch.ops.bigmodel_fast.attention_fwd
    expected, _ = call(q, k, v, None, None, None, None, None, seed, *options)
    found, _ = call(*(t.to(device) for t in (q, k, v)), None, None, None, None, None, seed.to(device), *options)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


def far(device: torch.device) -> str:
    """Offsets of 64 bits: the last rows of tensors that no 32-bit number counts the elements of."""
    rows, width, tail = 33_000, 1 << 16, 64
    needed = 5 * rows * width * 2
    if torch.cuda.mem_get_info(device)[0] < needed:
        raise Skip(f"takes {needed >> 30} GiB of free memory")
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    weight = torch.ones(width, device=device)
    target = torch.randint(width, (rows,), device=device)
    end = x[-tail:].clone()
    y = ops.rms_norm(x, weight)[-tail:].clone()
    torch.testing.assert_close(y, ops.rms_norm(end, weight))
    loss = ops.cross_entropy(x, target, reduction="none")[-tail:]
    torch.testing.assert_close(loss, ops.cross_entropy(end, target[-tail:], reduction="none"))
    return f"{x.numel():,} elements"


def determinism(device: torch.device) -> Iterator[Check]:
    """Races show in the bits of many runs sooner than in their errors."""
    for benchmark in operators():
        for case in benchmark.cases_on(device.type):
            if case.quick or "dropout" in case.name:
                for dtype in case.dtypes:
                    yield f"{benchmark.name}: {case.name}, {dtype}", partial(repeated, benchmark, case, dtype, device)
    for layout in ("gpt2", "modern"):
        yield f"GPT {layout}: loss and gradients", partial(repeated_gpt, layout, device)


def repeated(benchmark: OpBenchmark, case: Case, dtype: str, device: torch.device) -> str:
    task = benchmark.task(OURS, case, benchmark.inputs(case, dtype, device), dtype)

    def run() -> Results:
        torch.manual_seed(0)  # of dropout
        outputs = task.forward()
        grads = task.backward(outputs)
        made = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
        return made | {f"grad {name}": g for name, g in zip(task.wanted, grads, strict=True)}

    first = copied(run())
    for i in range(REPEATS - 1):
        same(run(), first, f"run {i + 2}")
    return f"{REPEATS} runs"


def repeated_gpt(layout: str, device: torch.device) -> str:
    model, inputs = gpt(gpt_case(layout), device)
    first = gradients(model, inputs.batches[0], bench_gpt.loss_and_gradients)
    for i in range(REPEATS - 1):
        same(gradients(model, inputs.batches[0], bench_gpt.loss_and_gradients), first, f"run {i + 2}")
    return f"{REPEATS} runs"

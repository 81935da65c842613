"""Several GPUs, and torch.compile on one, as far as fake tensors show them, which only say where they lie."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compare import as_tuple
from specs import all_specs, case_id
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

from bigmodel_fast.kernels import launch

from bigmodel_fast.models import GPT, GPTConfig

SECOND = torch.device("cuda", 1)  # which is not the current device


class Graphs:
    """A backend of torch.compile that keeps the graphs it is given and runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def operators(self) -> set[str]:
        """Ours, those of backward passes included."""
        modules = [m for graph in self.graphs for m in graph.modules() if isinstance(m, torch.fx.GraphModule)]
        targets = {str(node.target) for m in modules for node in m.graph.nodes if node.op == "call_function"}
        return {t.removeprefix("bigmodel_fast.") for t in targets if t.startswith("bigmodel_fast.")}


def on_second(t: Any) -> Any:
    """To be called in a FakeTensorMode."""
    if not isinstance(t, Tensor):
        return t
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=SECOND)


@pytest.mark.parametrize("spec", all_specs(), ids=case_id)
def test_forward_and_backward_are_one_graph_on_the_device_of_the_tensors(spec) -> None:
    """And no kernel of the CPU nor any reference stands in it."""
    torch._dynamo.reset()
    sample, backend = spec.samples[1], Graphs()
    compiled = torch.compile(spec.op, backend=backend, fullgraph=True, dynamic=False)
    given = {**sample.tensors(torch.bfloat16), **sample.options}
    with FakeTensorMode():
        arguments = {name: on_second(value) for name, value in given.items()}
        for name in sample.wanted:
            arguments[name].requires_grad_()
        outputs = as_tuple(compiled(**arguments))
    assert len(backend.graphs) == 1
    assert all(t.device == SECOND for t in outputs)
    assert any(t.requires_grad for t in outputs)
    stem = "attention" if spec.name == "attention_varlen" else spec.name
    backward = {"dropout": "fwd", "rotary": "fwd", "linear_cross_entropy": "fwd"}.get(stem, "bwd")
    assert backend.operators() == {f"{stem}_fwd", f"{stem}_{backward}"}


@pytest.mark.parametrize("layout", ["gpt2", "modern"])
def test_the_loss_of_a_gpt_is_one_graph(layout: str) -> None:
    torch._dynamo.reset()
    backend = Graphs()
    with FakeTensorMode(), torch.device(SECOND):
        model = GPT(GPTConfig(vocab_size=100, width=32, layers=2, heads=2, context=16, layout=layout))
        tokens = torch.zeros(2, 16, dtype=torch.int64)
        loss = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(tokens, tokens)
    assert len(backend.graphs) == 1
    assert loss.device == SECOND
    assert {"attention_fwd", "attention_bwd", "linear_cross_entropy_fwd"} <= backend.operators()


def test_a_kernel_is_started_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []

    @contextlib.contextmanager
    def device(which: torch.device):
        events.append(f"enter {which}")
        yield
        events.append(f"leave {which}")

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *_, **__: events.append(f"start {grid}")

    monkeypatch.setattr(torch.cuda, "device", device)
    with FakeTensorMode():
        t = torch.empty(4, device=SECOND)
    launch.run(Kernel(), (3,), (7, t), {}, 4)
    assert events == ["enter cuda:1", "start (3,)", "leave cuda:1"]
    launch.run(Kernel(), (3, 0), (7, t), {}, 4)
    assert len(events) == 3


def test_choices_are_those_of_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a machine has GPUs of different kinds."""
    kinds = [(9, 0, 132), (8, 0, 108)]
    names = ("major", "minor", "multi_processor_count")
    properties = [SimpleNamespace(**dict(zip(names, kind, strict=True))) for kind in kinds]
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    launch._present.cache_clear()
    with FakeTensorMode():
        tensors = [torch.empty(4, device=f"cuda:{i}") for i in range(2)]
    try:
        assert [launch.target_of(t) for t in tensors] == [launch.H100, launch.A100]
    finally:
        launch._present.cache_clear()

"""bmf.accelerate in the loops people have: the same losses as the stock model, before and after wrapping."""

import copy
import importlib.util
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerated import ops_used, packs
from torch import Tensor, nn

import bigmodel_fast as bmf

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

EXAMPLE = Path(__file__).parents[1] / "examples" / "accelerate_loops.py"
PACKAGES = {"plain": "torch", "trainer": "accelerate", "lightning": "lightning", "accelerator": "accelerate"}


@pytest.fixture(scope="module")
def loops():
    if not EXAMPLE.exists():
        pytest.skip("needs the source tree")
    spec = importlib.util.spec_from_file_location("accelerate_loops", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def process_group(tmp_path: Path):
    """One process, by gloo."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def collate(texts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([t[name] for t in texts]) for name in texts[0]}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loop", PACKAGES)
def test_a_loop_learns_the_same(loop: str, loops, monkeypatch) -> None:
    pytest.importorskip(PACKAGES[loop], reason=f"{PACKAGES[loop]} is not installed")
    texts = loops.draw_texts(6 * 8, 16)
    models = [loops.make_model(32, dropout=0.0) for _ in range(2)]
    bmf.explain(reset=True)
    expected = loops.LOOPS[loop](models[0], texts, 8, False, stock=True)
    assert not bmf.explain(reset=True).calls
    found = loops.LOOPS[loop](models[1], texts, 8, False, stock=False)
    assert len(found) == 6
    assert found == pytest.approx(expected, rel=1e-3)  # Trainer logs four digits
    assert packs(ops_used())
    bmf.restore(models[1])
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (p - q).abs().max() < 6 * 2e-4, name  # six steps of AdamW go 6e-4 at most


def test_the_example_runs(loops, monkeypatch, capsys) -> None:
    small = ["plain", "--steps", "2", "--batch", "4", "--length", "16", "--width", "32"]
    monkeypatch.setattr(sys, "argv", ["accelerate_loops", *small])
    loops.main()
    shown = capsys.readouterr().out
    assert "BertSelfAttention" in shown
    assert "step 2: loss" in shown
    assert "step 3" not in shown


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accelerated_first", [True, False])
def test_sharded(accelerated_first: bool, loops, process_group) -> None:
    """FSDP2: what has become DTensor is left alone; what was accelerated before computes on gathered weights."""
    from torch.distributed.fsdp import fully_shard

    model = loops.make_model(32, 0.0, layers=2).train()
    stock, batch = copy.deepcopy(model), collate(loops.draw_texts(4, 16))
    if accelerated_first:
        bmf.accelerate(model)
    for layer in model.bert.encoder.layer:
        fully_shard(layer)
    fully_shard(model)
    if not accelerated_first:
        assert "a weight is a DTensor" in {row.why for row in bmf.accelerate(model).left}
    model(**batch).loss.backward()
    stock(**batch).loss.backward()
    for p, q in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-3, atol=1e-5)
    if accelerated_first:
        with pytest.raises(RuntimeError, match="was changed after accelerate"):
            bmf.restore(model)
    else:
        bmf.restore(model)


@pytest.mark.parametrize("wrapped_first", [True, False])
def test_distributed_data_parallel(wrapped_first: bool, loops, process_group) -> None:
    model = loops.make_model(32, 0.0, layers=2).train()
    stock, batch = copy.deepcopy(model), collate(loops.draw_texts(4, 16))
    if not wrapped_first:
        bmf.accelerate(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    if wrapped_first:
        bmf.accelerate(wrapped)
    bmf.explain(reset=True)
    wrapped(**batch).loss.backward()
    assert packs(ops_used())
    stock(**batch).loss.backward()
    for p, q in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


def test_gradient_accumulation_and_packed_weights(loops) -> None:
    model = loops.make_model(32, dropout=0.0).train()
    stock = copy.deepcopy(model)
    bmf.accelerate(model)
    texts = loops.draw_texts(8, 16)
    halves = [collate(texts[:4]), collate(texts[4:])]
    for half in halves:
        stock(**half).loss.backward()
    with bmf.packed_weights(model.parameters()):
        for half in halves:
            model(**half).loss.backward()
    for p, q in zip(model.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-5)


def test_compiles(loops) -> None:
    """A compiled model computes its padding: how much there is only shows when it runs."""
    model, batch = loops.make_model(32, 0.0, layers=1).train(), collate(loops.draw_texts(4, 16))
    expected = model(**batch).loss
    bmf.accelerate(model)
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def test_a_deep_model_is_accelerated_in_the_time_of_a_few_steps() -> None:
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=24, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertForMaskedLM(config)
    token = torch.randint(100, (8, 64))
    times = []
    for _ in range(2):  # the first is a warm-up
        times.append(time.process_time())  # of this process: others may be at work
        model(token).logits.sum().backward()
    times.append(time.process_time())
    report = bmf.accelerate(model)
    times.append(time.process_time())
    assert times[3] - times[2] < 5 * (times[2] - times[1])  # 0.1 s of a small step's 0.13
    assert len(report.accelerated) > 24 * 8

"""The planner: exact where it counts, near to what is measured where it predicts, and what its command shows."""

import json
import math
from pathlib import Path

import pytest
import torch

for package in ("jsonargparse", "rich", "matplotlib"):
    pytest.importorskip(package)

from bigmodel_fast.benchmarks import prediction, scaling  # noqa: E402

from bigmodel_fast.cli import main  # noqa: E402
from bigmodel_fast.models import (  # noqa: E402
    BERT,
    GPT,
    BERTConfig,
    GPTConfig,
    Transformer,
    TransformerConfig,
    recompute_layers,
)
from bigmodel_fast.plan import Hardware, PlanConfig, Rate, Shape, Step, Work, cost, make_plan, memory, table  # noqa: E402
from bigmodel_fast.plan.measure import fitted, measure  # noqa: E402
from bigmodel_fast.plan.network import Network, ddp_seconds, fsdp_seconds, overlapped  # noqa: E402
from bigmodel_fast.plan.planner import bytes_per_token  # noqa: E402
from bigmodel_fast.plan.shape import sized  # noqa: E402
from bigmodel_fast.train import ConfigError  # noqa: E402
from bigmodel_fast.train.config import MaskConfig, PairConfig  # noqa: E402

GB = 10**9
KINDS = ("dense", "attention", "loss", "stream", "optimizer")


def device(rate: float = 1e12, space: float = 8 * 2**30, **how) -> Hardware:
    """Hardware on which every kind of work runs at `rate`, and bytes at a tenth of it."""
    rates = dict.fromkeys(KINDS, Rate(rate, rate / 10))
    return Hardware("a device", "cuda", "a device", space, {"bf16": rates, "fp32": rates}, call=1e-6, **how)


# ---- the model of a step ----


@pytest.mark.parametrize(
    "config",
    [
        GPTConfig(300, 32, 2, 4, 64),
        GPTConfig(300, 32, 3, 4, 64, layout="modern", kv_heads=2, mlp_width=96),
        BERTConfig(300, 32, 2, 4, 64),
        TransformerConfig(300, 32, 3, 4, 64, mlp_width=96),
    ],
    ids=["gpt2", "modern", "bert", "transformer"],
)
def test_shape_counts_as_the_model_does(config) -> None:
    model, _ = prediction.model_and_batch(prediction.Setup(config, 1, "fp32"))
    shape, length = Shape.of(config, predicted=0.25), 17.0
    counted = {
        GPT: lambda: model.flops_per_token(length),
        BERT: lambda: model.flops_per_token(length, 0.25),
        Transformer: lambda: model.flops(0.5, 0.5, length / 2, length / 2),
    }[type(model)]
    assert shape.parameters() == sum(p.numel() for p in model.parameters())
    assert shape.flops_per_token(length) == pytest.approx(counted())
    length = 32.0
    work = cost.step_work(shape, Step(2, 32, "fp32"))
    assert sum(w.flops for w in work.values()) == pytest.approx(64 * counted())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("make", [GPTConfig, BERTConfig, TransformerConfig])
def test_what_a_layer_keeps_is_counted_to_the_byte(make: type, recompute: bool, dtype: str) -> None:
    """What a second layer adds to the tensors that autograd's nodes hold."""
    kept = []
    for layers in (1, 2):
        held: dict[int, int] = {}

        def keep(t: torch.Tensor, held=held) -> torch.Tensor:
            held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        setup = prediction.Setup(make(300, 32, layers, 2, 64), 2, dtype, recompute)
        model, batch = prediction.model_and_batch(setup)
        recompute_layers(model, recompute)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            loss = model(*batch)
        kept.append(sum(size for address, size in held.items() if address not in own))
        del loss
    shape, step = Shape.of(setup.config), Step(2, 32, dtype)
    of_layer = cost.input_of_block if recompute else cost.activations_of_block
    expected = sum(of_layer(shape, step, kind) for kind in shape.kinds)
    assert kept[1] - kept[0] == pytest.approx(expected, rel=0.01)


SMALL = {"gpt2, fp32": 0, "modern, bf16": 1, "recomputed": 6, "bert": 7, "transformer": 10}  # of prediction.SETUPS


@pytest.mark.parametrize("index", SMALL.values(), ids=SMALL.keys())
def test_memory_is_as_measured(index: int) -> None:
    setup = prediction.SETUPS[index]
    measured = prediction.measured_memory(setup, torch.get_num_threads())
    if measured is None:
        pytest.skip("this system does not tell the most memory of a process")
    step = Step(setup.batch, setup.config.context, setup.dtype, recompute=setup.recompute)
    predicted = memory(Shape.of(setup.config, prediction.PREDICTED), step).peak
    assert predicted == pytest.approx(measured, rel=prediction.MEMORY_OFF)


def test_time_is_of_the_order_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine may be busy: `bench plan` tells how right it is on one that is not."""
    setup = prediction.SETUPS[1]
    monkeypatch.setattr("bigmodel_fast.plan.measure.LEAST", 1)
    machine = measure(torch.device("cpu"), setup.dtype, seconds=0.1)
    predicted = prediction.predict(setup, machine)[1]
    took = prediction.measured_seconds(setup, seconds=0.5)
    assert 0.4 < predicted / took < 2.5


def test_recompute_takes_time_and_gives_memory() -> None:
    shape = sized(10**8, 32000, 1024)
    kept, again = (Step(8, 1024, recompute=recompute, cpu=False) for recompute in (False, True))
    rates = device().rates["bf16"]
    slower = sum(cost.step_seconds(shape, again, rates, 0).values()) / sum(
        cost.step_seconds(shape, kept, rates, 0).values()
    )
    assert 1.2 < slower < 1.34
    assert memory(shape, again).activations < memory(shape, kept).activations / 3
    assert memory(shape, again).weights == memory(shape, kept).weights


def test_peak_counts_what_is_there_at_once() -> None:
    shape = sized(10**9, 32000, 1024)
    m = memory(shape, Step(1, 1024, cpu=False))
    together = m.activations + m.loss + m.workspace
    assert m.peak == m.weights + m.optimizer + max(m.gradients, together)
    pooled = memory(shape, Step(1, 1024, cpu=True))
    assert 0 < pooled.peak - m.peak <= cost.KEPT + (pooled.workspace - m.workspace)
    sharded = memory(shape, Step(1, 1024, shards=8, cpu=False))
    assert sharded.weights == m.weights / 8
    assert sharded.optimizer == m.optimizer / 8


def test_rates_are_found_from_two_samples() -> None:
    rate = Rate(3e11, 2e10)
    works = [Work(1e9, 4e7), Work(5e9, 9e7)]
    found = fitted([(w, rate.seconds(w)) for w in works])
    assert (found.flops, found.bytes) == pytest.approx((rate.flops, rate.bytes))
    assert fitted([(Work(0, 1e9), 0.5)]).bytes == 2e9
    odd = fitted([(works[0], 1.0), (works[1], 0.5)])  # less time for more work: no rate is negative
    assert odd.flops > 0
    assert odd.bytes > 0


# ---- several devices ----


def test_communication() -> None:
    eight = Network(8, 8, 100 * GB, 10 * GB)
    assert eight.all_reduce(8 * GB) == pytest.approx(2 * 7 / 8 * 0.08, rel=0.01)
    assert eight.all_reduce(8 * GB) == pytest.approx(2 * eight.gather(8 * GB))
    assert Network(1, 8, 100 * GB, 10 * GB).all_reduce(8 * GB) == 0
    many = Network(1024, 8, 100 * GB, 10 * GB)
    assert eight.all_reduce(8 * GB) < many.all_reduce(8 * GB) < eight.all_reduce(8 * GB) + 2 * GB / (10 * GB) + 0.01
    # A small buffer is a matter of messages, which a tree of many nodes needs fewer of.
    assert many.all_reduce(1000) < 2 * 127 * 20e-6


def test_overlap_hides_what_it_can() -> None:
    assert overlapped(1.0, 0.5, 10) == pytest.approx(1.05)
    assert overlapped(0.5, 1.0, 10) == pytest.approx(1.05)
    fast, slow = Network(8, 8, 1e15, 1e15), Network(8, 8, 1e6, 1e6)
    for seconds, extra in ((ddp_seconds, ()), (fsdp_seconds, (2,))):
        assert seconds(fast, 3.0, 1, 10**6, 12, *extra) == pytest.approx(3.0, rel=0.01)
        assert seconds(slow, 3.0, 1, 10**6, 12, *extra) > 6.0
    assert fsdp_seconds(slow, 3.0, 4, 10**6, 12, 2) > fsdp_seconds(slow, 3.0, 1, 10**6, 12, 2)


def test_the_page_on_scaling_comes_from_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "DEVICES", (8, 64))
    monkeypatch.setattr(scaling, "SHOWN", (8, 64))
    rows = [
        {
            "sweep": sweep,
            "width": setup.config.width,
            "context": setup.config.context,
            "batch": setup.batch,
            "threads": threads or 2,
            "parameters": 10**6,
            "flops": 1e9,
            "predicted": 0.011,
            "seconds": 0.010,
        }
        for sweep, setup, threads in scaling.sweeps()
    ]
    slow = {"cpu": "a CPU", "threads": 2, "torch": "2", "date": "today", "rows": rows}
    fast = slow | {"rows": [row | {"seconds": 0.005} for row in rows]}
    found = scaling.merged(slow, fast)
    assert {(row["seconds"], row["predicted"]) for row in found["rows"]} == {(0.005, 0.011)}
    with pytest.raises(ValueError, match="another machine"):
        scaling.merged(slow, fast | {"cpu": "another"})
    (tmp_path / "scaling.json").write_text(json.dumps(found))
    assert scaling.main([str(tmp_path / "scaling.json"), "--docs", str(tmp_path)]) == 0
    text = (tmp_path / "scaling.md").read_text()
    assert "| 768 | 1.0M | 5 ms | 11 ms |" in text
    assert "off by 120% on average" in text
    assert "2 (n - 1)/n S/B + 2 (n - 1) a" in text
    assert text.count("| 7B | 64 |") == 2 * len(scaling.HARDWARE)
    assert (tmp_path / "images" / "scaling.png").read_bytes().startswith(b"\x89PNG")


# ---- a plan ----


def test_best_is_the_fastest_that_fits() -> None:
    config = PlanConfig(size="100M", vocab_size=32000, tokens="1B", price=2.0)
    config.model.context, config.optim.batch = 1024, 64
    plan = make_plan(config, device())
    best = plan.best
    assert best is not None
    assert best.memory.peak <= plan.usable_memory < max(o.memory.peak for o in plan.options)
    assert best.tokens_per_second >= 0.98 * max(o.tokens_per_second for o in plan.options if o.fits)
    assert all(o.batch * o.accumulation == 64 for o in plan.options)
    assert plan.run["hours"] == pytest.approx(1e9 / best.tokens_per_second / 3600)
    assert plan.run["dollars"] == pytest.approx(2 * plan.run["hours"])
    assert plan.run["steps"] == pytest.approx(1e9 / (64 * 1024))
    assert make_plan(config, device(space=2**30)).best is None


def test_hours_and_budget_give_the_tokens() -> None:
    def run(**how) -> dict:
        config = PlanConfig(size="100M", vocab_size=32000, price=2.0, **how)
        return make_plan(config, device()).run

    assert run(hours=3.0)["hours"] == pytest.approx(3)
    assert run(budget=6.0) == run(hours=3.0)
    assert run(steps=10)["steps"] == 10
    assert run(minutes=6.0)["hours"] == pytest.approx(0.1)
    assert run()["tokens_per_parameter"] == 20


def test_optimal_model_takes_the_time_there_is() -> None:
    plan = make_plan(PlanConfig(size="100M", vocab_size=32000, hours=24.0), device(space=2**40))
    assert plan.optimal is not None
    assert 0.85 * 24 < plan.optimal.hours <= 24
    assert plan.optimal.tokens == 20 * plan.optimal.parameters
    costs = [s.hours for s in plan.sizes]
    assert costs == sorted(costs)


@pytest.mark.parametrize("parameters", [10**7, 124 * 10**6, 7 * 10**9, 175 * 10**9])
def test_size_gives_a_model_of_about_so_many_parameters(parameters: int) -> None:
    shape = sized(parameters, 32000, 2048)
    assert shape.parameters() == pytest.approx(parameters, rel=0.03)
    assert 30 < shape.width / shape.layers < 200


def test_hugging_face_configs(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    shared = {"vocab_size": 500, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = transformers.LlamaConfig(**shared, num_key_value_heads=2, intermediate_size=96, max_position_embeddings=64)
    gpt2 = transformers.GPT2Config(vocab_size=500, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    for config, kind in ((llama, transformers.LlamaForCausalLM), (gpt2, transformers.GPT2LMHeadModel)):
        config.save_pretrained(tmp_path)
        with torch.device("meta"):
            model = kind(config)
        plan = make_plan(PlanConfig(hf=str(tmp_path)), device())
        assert plan.parameters == sum(p.numel() for p in model.parameters())


def test_table_of_hardware_says_where_its_figures_come_from() -> None:
    assert len(table()) >= 10
    assert {h.kind for h in table().values()} == {"cpu", "cuda"}
    for name, h in table().items():
        assert h.source
        assert 0.1 < h.price < 20
        assert h.peaks["bf16"] > h.peaks["fp32"] > 1e12, name
        assert h.memory >= 2**34


def test_tokens_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcd " * 20000)
    config = PlanConfig(data=str(tmp_path), tokenizer="bytes")
    assert make_plan(config, device()).run["tokens"] == 100_000
    config.tokenizer, config.vocab_size = "bpe", 2048
    assert make_plan(config, device()).run["tokens"] == pytest.approx(100_000 / bytes_per_token(2048))
    assert 2.8 < bytes_per_token(2048) < 3.1


def test_a_bert_is_planned_by_the_length_it_is_given() -> None:
    plan = make_plan(PlanConfig(objective="mlm", steps=10, mlm=MaskConfig(share=0.3)), device())
    assert plan.best is not None
    assert (plan.name, plan.shape.objective, plan.shape.predicted) == ("BERT", "mlm", 0.3)
    assert plan.run["steps"] == 10
    assert (plan.sizes, plan.optimal) == ([], None)  # 20 tokens a parameter are known of GPTs
    with pytest.raises(ConfigError, match="tokens: the length of a run of mlm must be given"):
        make_plan(PlanConfig(objective="mlm"), device())
    with pytest.raises(ConfigError, match="size: for objective clm only"):
        make_plan(PlanConfig(objective="mlm", steps=10, size="7B"), device())


def test_a_transformer_is_planned_by_its_pairs(tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / f"{split}.en").write_text("abc\n" * 10)
        (tmp_path / f"{split}.de").write_text("abcdefg\n" * 10)
    pairs = PairConfig(languages="en-de")
    how = {"objective": "seq2seq", "tokenizer": "bytes", "seq2seq": pairs, "cache": str(tmp_path / "cache")}
    plan = make_plan(PlanConfig(data=str(tmp_path), **how), device())
    assert plan.tokens_per_step == 8 * (4 + 8)  # each side with its end
    assert plan.run["tokens"] == 10 * (4 + 8)
    full = make_plan(PlanConfig(steps=5, **how), device())
    assert full.tokens_per_step == 8 * 2 * 256
    assert full.best.seconds > plan.best.seconds


# ---- the command ----


def test_command_prints_tables_json_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--size", "1.3B", "--hardware", "h100", "--gpus", "16", "--tokens", "10B"]
    assert main([*argv, "--chart", str(tmp_path / "plan.png")]) == 0
    text = capsys.readouterr().out
    for part in ("sequences a pass", "fsdp", "ddp", "optimizer", "activations", "USD", "tokens/s", "Hoffmann"):
        assert part in text
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert main([*argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == 16
    assert found["price"] == pytest.approx(16 * table()["h100"].price)
    assert found["parameters"] == pytest.approx(1.3e9, rel=0.03)
    assert found["best"]["fits"]
    assert math.isclose(found["run"]["dollars"], found["price"] * found["run"]["hours"])
    assert found["sizes"][0]["parameters"] < found["parameters"]
    bert = ["--objective", "mlm", "--steps", "9", "--model.layers", "48", "--model.width", "1024", "--model.heads", "8"]
    assert main(["plan", *bert, "--model.context", "16384", "--optim.batch", "8", "--hardware", "l4"]) == 0
    text = capsys.readouterr().out
    assert "best: --optim.batch 1 --optim.accumulation 8 --recompute\n" in text
    assert "compute-optimal" not in text
    assert main(["plan", "--size", "1T", "--hardware", "l4"]) == 1
    assert "fits in no way" in capsys.readouterr().out
    assert main(["plan", "--hardware", "list"]) == 0
    assert "h100" in capsys.readouterr().out


def test_command_plans_a_runs_own_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    from bigmodel_fast.train import TrainConfig

    config = TrainConfig(steps=7)
    config.model.layers = 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    argv = ["plan", "--config", str(tmp_path / "config.yaml"), "--hardware", "epyc-genoa-32", "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["shape"]["layers"] == 3
    assert found["run"]["steps"] == 7
    assert found["hardware"]["kind"] == "cpu"


def test_plan_refuses_before_it_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bigmodel_fast.plan.measure.measure", lambda *_: pytest.fail("measured"))
    for wrong, key in (
        ({"gpus": 3, "hardware": "h100"}, "gpus"),
        ({"gpus": 8}, "gpus"),
        ({"size": "7B", "hf": "x"}, "hf"),
        ({"tokens": "1B", "hours": 1.0}, "hours"),
        ({"tokens": "many"}, "tokens"),
        ({"hardware": "abacus"}, "hardware"),
        ({"hf": "/nowhere"}, "hf"),
    ):
        with pytest.raises(ConfigError, match=key):
            make_plan(PlanConfig(**wrong))

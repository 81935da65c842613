"""How a pass is run: batches copied ahead, CUDA graphs, torch.compile, too little memory; what a run leaves behind."""

import contextlib
from pathlib import Path

import pytest
import torch
from test_train import Act, checkpoints, fail, terminate, without_times

from bigmodel_fast._machine import cannot_compile
from bigmodel_fast.cli import main
from bigmodel_fast.data import Batches, DataError
from bigmodel_fast.train import (
    ConfigError,
    TrainConfig,
    Trainer,
    TrainError,
    loop,
    passes,
    pretrain,
    read_metrics,
    setup,
)
from bigmodel_fast.train.errors import is_out_of_memory
from bigmodel_fast.train.guard import smaller_passes
from bigmodel_fast.train.objectives import causal
from bigmodel_fast.train.passes import Feed

needs_compiler = pytest.mark.skipif(cannot_compile("cpu") is not None, reason="there is no C++ compiler")


def losses(config: TrainConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(config.out_folder / "metrics.jsonl") if "loss" in line]


def weights(trainer: Trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.model.parameters()]


def assert_same_weights(one: Trainer, other: Trainer) -> None:
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


# ---- batches ----


def test_a_batch_is_copied_ahead_and_the_position_is_that_of_the_one_in_use(copying) -> None:
    tokens = torch.arange(200).numpy()
    plain, feed = Batches(tokens, 2, 8), Feed(Batches(tokens, 2, 8), torch.device("cpu"))
    for _ in range(20):  # more than an epoch
        expected = plain.next()
        found = feed.next()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        before = len(copying)
        feed.look_ahead()
        assert copying[before:] == ["copy", "copy"]
        feed.look_ahead()
        assert len(copying) == before + 2
        assert feed.state_dict() == plain.state_dict()
    feed.load_state_dict({"seed": 0, "epoch": 0, "position": 0})
    assert torch.equal(feed.next()[0], Batches(tokens, 2, 8).next()[0])


def test_a_run_that_copies_ahead_is_the_same_run_and_resumes_to_the_bit(settings, copying) -> None:
    straight, stopped = (
        settings("straight", {"accumulation": 2}),
        settings("stopped", {"accumulation": 2}, resume="auto"),
    )
    whole = Trainer(straight)
    whole.run()
    assert "copy" in copying
    pretrain(stopped, Act(3, terminate))
    resumed = Trainer(stopped)
    resumed.run()
    assert_same_weights(whole, resumed)
    assert losses(straight) == losses(stopped)


def test_nothing_is_drawn_ahead_on_the_cpu(settings) -> None:
    trainer = Trainer(settings(steps=3))
    trainer.run()
    assert trainer.objective.batches.state_dict() == trainer.feed.state_dict()


# ---- CUDA graphs ----


class Seeming:
    """Stands for torch.cuda's streams and graphs on the CPU: what is recorded leaves no trace until it is replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.replays = 0
        self.recorded = None
        monkeypatch.setattr(torch.cuda, "Stream", lambda *_: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "graph", self.record)
        monkeypatch.setattr(loop.setup, "require_features", lambda config, device, ranks: None)

    def wait_stream(self, other) -> None: ...

    @contextlib.contextmanager
    def record(self, graph):
        run = self.whole._run_pass
        gradients = [p.grad.clone() for p in self.whole.model.parameters()]
        yield
        for p, g in zip(self.whole.model.parameters(), gradients, strict=True):
            p.grad.copy_(g)
        self.run = run

    def replay(self) -> None:
        self.replays += 1
        one_pass = self.whole._pass
        one_pass._loss.copy_(self.run(*one_pass._batch))


def test_a_run_of_graphs_is_the_run_without(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Trainer(settings("plain", {"accumulation": 2}))
    plain.run()
    seeming = Seeming(monkeypatch)
    graphed = seeming.whole = Trainer(settings("graphed", {"accumulation": 2}, cuda_graphs=True))
    addresses = []
    graphed.report = Act(0, fail)
    graphed.report.step = lambda step: addresses.append([p.grad.data_ptr() for p in graphed.model.parameters()])
    graphed.run()
    assert isinstance(graphed._pass, passes.GraphedPass)
    assert seeming.replays == 2 * 8
    assert all(a == addresses[0] for a in addresses)  # the graph knows them
    assert losses(plain.config) == losses(graphed.config)
    assert_same_weights(plain, graphed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_of_graphs_on_a_gpu_is_the_run_without(settings, dtype: str) -> None:
    runs = [settings(str(graphs), {"accumulation": 2}, dtype=dtype, cuda_graphs=graphs) for graphs in (False, True)]
    for config in runs:
        pretrain(config)
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=1e-3)


def test_what_cannot_work_is_one_line_before_any_work(settings, tmp_path: Path, monkeypatch, capsys) -> None:
    with pytest.raises(ConfigError, match="cuda_graphs: needs a CUDA device, and the run is on cpu"):
        Trainer(settings(cuda_graphs=True, device="cpu"))
    with pytest.raises(ConfigError, match="cuda_graphs: not with recompute"):
        setup.require_features(settings(cuda_graphs=True, recompute=True), torch.device("cuda"), 1)
    out = tmp_path / "cli"
    assert main(["pretrain", "--device", "cpu", "--cuda-graphs", "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        "bigmodel-fast pretrain: cuda_graphs: needs a CUDA device, and the run is on cpu\n"
    )
    monkeypatch.setattr(loop.setup, "cannot_compile", lambda device: "torch.compile needs a compiler")
    with pytest.raises(ConfigError, match=r"compile: torch\.compile needs a compiler"):
        Trainer(settings(compile=True))
    assert not out.exists()
    assert not settings().out_folder.exists()


# ---- torch.compile ----


@needs_compiler
def test_a_compiled_run_learns_the_same_and_resumes_to_the_bit(settings) -> None:
    torch._dynamo.reset()
    options = {"compile": True, "steps": 6, "eval_every": 3, "eval_sequences": 4}
    straight, stopped = settings("straight", **options), settings("stopped", resume="auto", **options)
    whole = Trainer(straight)
    calls = []
    assert isinstance(whole._forward, torch._dynamo.OptimizedModule)
    whole._forward = spy(whole._forward, calls)
    whole.run()
    assert len(calls) == 6
    pretrain(stopped, Act(2, terminate))
    torch._dynamo.reset()  # as in a new process
    resumed = Trainer(stopped)
    resumed.run()
    assert_same_weights(whole, resumed)
    lines = [without_times(read_metrics(c.out_folder / "metrics.jsonl")) for c in (straight, stopped)]
    assert lines[0] == lines[1]
    plain = settings("plain", steps=6)
    pretrain(plain)
    assert losses(straight) == pytest.approx(losses(plain), rel=1e-3)


def spy(function, calls: list):
    def called(*arguments, **named):
        calls.append(arguments)
        return function(*arguments, **named)

    return called


# ---- memory ----


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 4 bytes"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
        RuntimeError("std::bad_alloc"),
        MemoryError(),
    ],
    ids=repr,
)
def test_too_little_memory_is_one_line_with_a_way_out(error, settings, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(optim={"batch": 6, "accumulation": 2}, save_every=2)
    trainer = Trainer(config)

    def full() -> None:
        raise error

    trainer.report = Act(3, full)
    with pytest.raises(TrainError) as raised:
        trainer.run()
    line = str(raised.value)
    assert "\n" not in line
    assert "step 3: out of memory with 6 sequences a pass; --optim.batch 3 --optim.accumulation 4" in line
    assert "keeps the tokens of a step" in line
    assert line.endswith(f"the last good checkpoint is {config.out_folder}/checkpoints/step-00000002")
    again = settings(optim={"batch": 3, "accumulation": 4}, resume="auto")
    assert Trainer(again).objective.tokens_per_step == trainer.objective.tokens_per_step
    assert pretrain(again).steps_done == 6


def test_an_allocation_that_the_system_refuses_is_known() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 52)
    assert is_out_of_memory(raised.value)
    assert not is_out_of_memory(RuntimeError("size mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (8, "--optim.batch 4 --optim.accumulation 6 "),
        (9, "--optim.batch 3 --optim.accumulation 9 "),
        (7, "--optim.batch 1 --optim.accumulation 21 "),
        (1, "with one sequence a pass; a smaller model"),
    ],
)
def test_smaller_passes_keep_the_tokens_of_a_step(batch: int, words: str) -> None:
    assert words in smaller_passes(batch, 3, "a smaller model")


def test_one_sequence_that_does_not_fit_may_have_its_layers_recomputed(settings) -> None:
    for recompute, words in ((False, "a pass; take --recompute, or lower --model"), (True, "a pass; lower --model")):
        trainer = Trainer(settings(str(recompute), {"batch": 1}, recompute=recompute))
        assert words in trainer._less_memory()


def test_a_model_that_does_not_fit_is_one_line(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(config):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(causal, "GPT", full)
    with pytest.raises(TrainError, match="out of memory for the model itself"):
        Trainer(settings())
    assert not settings().out_folder.exists()


def test_other_passes_of_another_step_are_another_run(settings) -> None:
    one = settings(optim={"batch": 4, "accumulation": 2})
    assert one.differences(settings(optim={"batch": 2, "accumulation": 4})) == []
    assert one.differences(settings(optim={"batch": 2, "accumulation": 2})) == ["optim.batch"]
    assert one.differences(settings(optim={"batch": 2, "accumulation": 4, "lr": 1.0})) == ["optim.lr"]


# ---- what is left behind ----


def test_the_picture_is_drawn_at_each_save_but_not_all_the_time(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "DRAW_SECONDS", 0.0)
    config = settings(save_every=3)
    picture = config.out_folder / "loss.png"
    drawn = []

    class Looking(Act):
        def step(self, step) -> None:
            drawn.append(picture.exists() and picture.stat().st_mtime_ns)

    pretrain(config, Looking(0, fail))
    assert drawn[:3] == [False] * 3
    assert drawn[3] == drawn[4] == drawn[5] != drawn[6]
    assert picture.stat().st_mtime_ns > drawn[7]
    monkeypatch.setattr(loop, "DRAW_SECONDS", 60.0)
    drawn.clear()
    pretrain(settings(steps=12, save_every=2, resume="auto"), Looking(0, fail))
    assert len(set(drawn)) == 1


def test_a_picture_that_cannot_be_drawn_ends_nothing(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_) -> None:
        raise ValueError("no fonts\nanywhere")

    monkeypatch.setattr(loop, "plot_losses", broken)
    told = []
    seen = Act(0, fail)
    seen.message = told.append
    assert pretrain(settings(save_every=4), seen).finished
    assert set(told) == {"loss.png could not be drawn: no fonts anywhere"}
    assert checkpoints(settings()) == ["step-00000004", "step-00000008"]


def test_bad_input_leaves_no_folder(settings, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    for data in (tmp_path / "nothing", tmp_path / "nowhere"):
        with pytest.raises(DataError):
            Trainer(settings("deep/down/run", data=str(data)))
    with pytest.raises(DataError, match="less than one batch"):
        Trainer(settings("deep/down/run", optim={"batch": 400}))
    assert not (tmp_path / "deep").exists()
    (tmp_path / "deep" / "down").mkdir(parents=True)
    with pytest.raises(DataError):
        Trainer(settings("deep/down/run", data=str(tmp_path / "nowhere")))
    assert (tmp_path / "deep" / "down").is_dir()
    assert not (tmp_path / "deep" / "down" / "run").exists()

"""The training loop: what it learns, writes, saves, and how it goes on."""

import errno
import json
import math
import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch

from bigmodel_fast.data import DataError

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

from bigmodel_fast.train import (
    CheckpointError,
    ConfigError,
    Evaluation,
    Reporter,
    Step,
    TrainConfig,
    Trainer,
    TrainError,
    load_checkpoint,
    plot_losses,
    pretrain,
    read_metrics,
)
from bigmodel_fast.train.signals import StopRequest


class Act(Reporter):
    """Calls `action` after the step given."""

    def __init__(self, step: int, action):
        self.at, self.action = step, action
        self.steps: list[Step] = []
        self.evaluations: list[Evaluation] = []

    def step(self, step: Step) -> None:
        self.steps.append(step)
        if step.step == self.at:
            self.action()

    def evaluation(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def fail() -> None:
    raise RuntimeError("the machine went away")


def checkpoints(config: TrainConfig) -> list[str]:
    return sorted(p.name for p in (config.out_folder / "checkpoints").iterdir() if p.name != "LATEST")


def without_times(lines: list[dict]) -> list[dict]:
    return [{k: v for k, v in x.items() if k not in ("elapsed", "tokens_per_second", "gflops")} for x in lines]


# ---- learning ----


def test_validation_loss_falls_and_metrics_and_picture_are_written(settings) -> None:
    config = settings(steps=60, eval_every=20)
    seen = Act(0, fail)
    result = pretrain(config, seen)
    assert [e.step for e in seen.evaluations] == [20, 40, 60]
    losses = [e.loss for e in seen.evaluations]
    assert losses[0] < math.log(257) - 1
    assert losses[2] < losses[1] < losses[0]
    assert result.finished
    assert result.step == result.steps_done == 60
    assert result.evaluation == seen.evaluations[-1]
    assert result.evaluation.perplexity == pytest.approx(math.exp(losses[2]))

    lines = read_metrics(config.out_folder / "metrics.jsonl")
    assert [x["step"] for x in lines if "loss" in x] == list(range(1, 61))
    assert [x["validation_loss"] for x in lines if "validation_loss" in x] == losses
    assert [x["loss"] for x in lines if "loss" in x] == [s.loss for s in seen.steps]
    picture = config.out_folder / "loss.png"
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    empty = picture.with_name("empty.png")
    plot_losses(config.out_folder / "nothing.jsonl", empty)
    assert picture.stat().st_size > empty.stat().st_size  # there are lines in it


def test_bits_per_byte_count_the_bytes_of_the_text(settings) -> None:
    seen = Act(0, fail)
    trainer = Trainer(settings(steps=1), seen)
    trainer.run()
    batches = trainer.objective.validation()
    tokens = torch.cat([targets.flatten() for _, targets in batches])
    ends = int((tokens == trainer.objective.tokenizer.end).sum())
    assert ends > 0
    expected = seen.evaluations[0].loss / math.log(2) * len(tokens) / (len(tokens) - ends)
    assert seen.evaluations[0].bits_per_byte == pytest.approx(expected)


def test_accumulation_is_a_larger_batch(settings) -> None:
    seen = Act(0, fail), Act(0, fail)
    whole = Trainer(settings("a", {"batch": 4}, steps=3), seen[0])
    parts = Trainer(settings("b", {"batch": 2, "accumulation": 2}, steps=3), seen[1])
    rows = whole.objective.batches.next()
    whole.objective.batches.next = lambda: rows
    halves = [tuple(t[i : i + 2] for t in rows) for i in (0, 2)] * 3
    parts.objective.batches.next = lambda: halves.pop(0)
    whole.run()
    parts.run()
    assert not halves
    for one, other in zip(seen[0].steps, seen[1].steps, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-2)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_only_matrices_decay(settings) -> None:
    trainer = Trainer(
        settings(
            optim={"weight_decay": 0.3}, model={"layout": "gpt2", "layers": 1, "heads": 2, "width": 32, "context": 16}
        )
    )
    decay = {p: g["weight_decay"] for g in trainer.optimizer.param_groups for p in g["params"]}
    for name, p in trainer.model.named_parameters():
        assert decay[p] == (0.3 if p.dim() == 2 else 0.0), name
    assert {p.dim() for p in decay} == {1, 2}


def test_gradients_are_clipped(settings) -> None:
    trainer = Trainer(settings(optim={"clip": 1e-3}, steps=1))
    trainer.run()
    beta = trainer.optimizer.param_groups[0]["betas"][0]
    first_moments = [state["exp_avg"].flatten() for state in trainer.optimizer.state.values()]
    assert torch.cat(first_moments).norm().item() / (1 - beta) == pytest.approx(1e-3, rel=1e-2)


def test_the_learning_rate_warms_up_and_falls_to_the_floor_over_either_budget(settings) -> None:
    trainer = Trainer(settings(optim={"lr": 1.0, "warmup": 10, "floor": 0.1}, steps=1000, minutes=10.0))
    assert trainer.learning_rate() == pytest.approx(0.1)
    trainer.step = 9
    assert trainer.learning_rate() == pytest.approx(1.0, rel=1e-3)
    trainer.step = 500
    assert trainer.learning_rate() == pytest.approx(0.55)
    trainer.elapsed = 599.999
    assert trainer.learning_rate() == pytest.approx(0.1)
    trainer.elapsed, trainer.step = 0.0, 1000
    assert trainer.learning_rate() == pytest.approx(0.1)


def test_minutes_end_a_run(settings) -> None:
    seen = Act(0, fail)
    trainer = Trainer(settings(steps=None, minutes=1e-4), seen)
    assert trainer.run().finished
    assert trainer.progress == 1  # maybe since the last step was reported: saving takes time too
    assert all(s.progress < 1 for s in seen.steps[:-1])


def test_tensorboard_events(settings) -> None:
    pytest.importorskip("tensorboard")
    config = settings(steps=2, tensorboard=True)
    pretrain(config)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(config.out_folder / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("train/loss")] == [1, 2]
    assert [e.step for e in events.Scalars("validation/validation_loss")] == [2]


# ---- going on ----


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_resumed_run_is_the_run_that_never_stopped_to_the_bit(settings, dtype: str) -> None:
    straight = settings("straight", {"accumulation": 3}, dtype=dtype, eval_every=3)
    draws: list[float] = []

    class Drawing(Act):
        """Takes a random number after each step, as dropout would."""

        def step(self, step: Step) -> None:
            draws.append(torch.rand(()).item())
            super().step(step)

    pretrain(straight, Drawing(0, fail))
    stopped = settings("stopped", {"accumulation": 3}, dtype=dtype, eval_every=3, resume="auto")
    first = pretrain(stopped, Drawing(3, terminate))
    assert (first.finished, first.step) == (False, 3)
    assert checkpoints(stopped) == ["step-00000003"]
    torch.manual_seed(99)  # a new process has other random numbers
    second = pretrain(stopped, Drawing(0, fail))
    assert draws[:8] == draws[8:]
    assert (second.finished, second.step, second.steps_done) == (True, 8, 5)

    one, other = (load_checkpoint(c.out_folder) for c in (straight, stopped))
    for name in ("model.safetensors", "optimizer.safetensors", "tokenizer.json"):
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes(), name
    for key in ("step", "batches", "random", "corpus", "model"):
        assert one.state[key] == other.state[key], key
    assert one.state["batches"]["epoch"] > 0  # the order of the data was drawn again meanwhile
    lines = [without_times(read_metrics(c.out_folder / "metrics.jsonl")) for c in (straight, stopped)]
    assert lines[0] == lines[1]


def test_after_a_crash_the_steps_since_the_checkpoint_are_done_again(settings) -> None:
    config = settings(save_every=4, resume="auto")
    with pytest.raises(RuntimeError, match="went away"):
        pretrain(config, Act(6, fail))
    metrics = config.out_folder / "metrics.jsonl"
    with metrics.open("a") as f:
        f.write('{"step": 7, "lo')  # the crash cut a line short
    result = pretrain(config)
    assert result.steps_done == 4
    assert [x["step"] for x in read_metrics(metrics) if "loss" in x] == list(range(1, 9))
    assert all(json.loads(line) for line in metrics.read_text().splitlines())


def test_a_finished_run_does_nothing_until_its_budget_grows(settings) -> None:
    pretrain(settings())
    before = (settings().out_folder / "metrics.jsonl").read_text()
    again = pretrain(settings(resume="auto"))
    assert (again.finished, again.steps_done) == (True, 0)
    assert (settings().out_folder / "metrics.jsonl").read_text() == before
    assert pretrain(settings(resume="auto", steps=10)).steps_done == 2


def test_resume_auto_begins_where_nothing_is(settings) -> None:
    assert pretrain(settings(resume="auto", steps=2)).steps_done == 2


def test_a_run_is_never_overwritten(settings) -> None:
    config = settings(save_every=2, steps=4)
    pretrain(config)
    with pytest.raises(ConfigError, match=r"out: .* holds a run already"):
        pretrain(settings())
    with pytest.raises(ConfigError, match="step-00000004 is later"):
        pretrain(settings(resume=str(config.out_folder / "checkpoints" / "step-00000002")))
    fork = settings("fork", steps=4, resume=str(config.out_folder / "checkpoints" / "step-00000002"))
    assert pretrain(fork).steps_done == 2
    assert checkpoints(config) == ["step-00000002", "step-00000004"]


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("model.width", {"model": {"layers": 1, "heads": 2, "width": 64, "context": 16}}),
        ("optim.lr", {"optim": {"lr": 2e-2}}),
        ("seed", {"seed": 5}),
        ("dtype", {"dtype": "bf16"}),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_key(settings, key: str, change: dict) -> None:
    pretrain(settings(steps=2))
    with pytest.raises(CheckpointError, match=rf"of another run \({key} is .*config\.yaml"):
        pretrain(settings(steps=4, resume="auto", **change))


def test_a_checkpoint_of_other_text_is_refused(settings, corpus: Path) -> None:
    pretrain(settings(steps=2))
    (corpus / "3.txt").write_text("something else entirely")
    with pytest.raises(CheckpointError, match="another text"):
        pretrain(settings(steps=4, resume="auto"))


def test_the_second_ctrl_c_does_not_wait() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# ---- failing ----


def test_a_loss_that_stays_nan_ends_the_run_and_leaves_good_weights(settings) -> None:
    config = settings(optim={"lr": 1e30, "warmup": 0}, steps=100, save_every=1)
    seen = Act(0, fail)
    with pytest.raises(TrainError, match=r"no finite loss .* lower optim\.lr .* last good checkpoint"):
        pretrain(config, seen)
    assert [s.step for s in seen.steps] == [1, *range(2, 12), *range(2, 12)]  # once more from the checkpoint
    model = load_checkpoint(config.out_folder).model()
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_full_disk_in_mid_run_leaves_the_last_checkpoint(settings) -> None:
    config = settings(save_every=2, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk() -> None:  # no file may grow beyond 8 kB: what writes gets an OSError, as on a full disk
        until = time.monotonic() + 30
        while checkpoints(config) != ["step-00000002"] and time.monotonic() < until:  # written beside the steps
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))

    try:
        with pytest.raises(TrainError, match=r"step \d+: cannot write to .* last good checkpoint is .*step-00000002"):
            pretrain(config, Act(3, fill_disk))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoints(config) == ["step-00000002"]
    assert load_checkpoint(config.out_folder).step == 2
    resumed = pretrain(settings(save_every=2, keep=1, resume="auto"))
    assert resumed.steps_done == 6


def test_a_metrics_file_that_cannot_be_written_ends_the_run(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self, values, group) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("bigmodel_fast.train.metrics.MetricsLog.write", full)
    with pytest.raises(TrainError, match=r"No space left on device.*nothing was saved before"):
        pretrain(settings())


def test_a_folder_that_cannot_be_written_is_named_before_any_work(settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out: cannot write to .*file/run"):
        Trainer(settings("file/run"))
    with pytest.raises(ConfigError, match=r"data or cache: .*file"):
        Trainer(settings(cache=str(tmp_path / "file")))


def test_text_too_short_for_a_batch(settings) -> None:
    with pytest.raises(DataError, match="less than one batch of 400 x 16"):
        Trainer(settings(optim={"batch": 400}))
    with pytest.raises(DataError, match=r"validation text has .* less than a sequence of 512"):
        Trainer(settings(optim={"batch": 1}, model={"layers": 1, "heads": 2, "width": 32, "context": 512}))

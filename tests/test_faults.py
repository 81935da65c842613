"""What happens to a run that meets spikes, a second run in its folder, or trouble while a checkpoint is written."""

import errno
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("yaml")

from test_train import Act, fail

from bigmodel_fast.train import ConfigError, Trainer, TrainError, load_checkpoint, pretrain, read_metrics, saver
from bigmodel_fast.train.faults import BAD_STEPS, FIRST_SPIKE, Health
from bigmodel_fast.train.lock import RunLock


class Listening(Act):
    def __init__(self) -> None:
        super().__init__(0, fail)
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


def spoil(trainer: Trainer, bad: set[int], factor: float = math.nan) -> None:
    """Multiplies the loss of some passes, counted from 1."""
    plain, passes = trainer.objective.loss, 0

    def loss(model, *batch):
        nonlocal passes
        value = plain(model, *batch)
        if model is trainer._forward and torch.is_grad_enabled():
            passes += 1
            if passes in bad:
                return value * factor
        return value

    trainer.objective.loss = loss


# ---- spikes and NaN ----


def test_a_spike_is_known_by_what_came_before() -> None:
    health = Health(spike=10.0)
    for i in range(FIRST_SPIKE):
        assert health.fault(3.0 + 0.05 * (i % 3), 1.0) is None
    assert health.fault(3.4, 1.0) is None
    assert "a spike of the loss (9 after 3.0" in str(health.fault(9.0, 1.0))
    assert "no finite loss" in str(health.fault(math.nan, 1.0))
    assert "no finite loss" in str(health.fault(3.0, math.inf))
    assert health.bad == 3
    again = Health(spike=10.0)
    again.load_state_dict(json.loads(json.dumps(health.state_dict())))
    assert again.state_dict() == health.state_dict()
    assert again.fault(9.0, 1.0) is not None
    assert health.fault(3.05, 1.0) is None
    assert health.bad == 0
    assert Health(spike=0.0).fault(1e9, 1.0) is None
    early = Health(spike=10.0)
    assert [early.fault(x, 1.0) for x in (3.0, 9.0)] == [None, None]


@pytest.mark.parametrize("factor", [math.nan, 1e4])
def test_nothing_is_learned_from_a_bad_step_and_the_data_goes_on(settings, factor: float) -> None:
    seen = Listening()
    trainer = Trainer(settings(steps=FIRST_SPIKE + 3), seen)
    spoil(trainer, {FIRST_SPIKE + 2}, factor)
    before = {}
    at = {FIRST_SPIKE + 1: "before", FIRST_SPIKE + 2: "after"}
    plain = trainer._report_step

    def look(*args) -> None:
        if trainer.step in at:
            before[at[trainer.step]] = [p.detach().clone() for p in trainer.model.parameters()]
        plain(*args)

    trainer._report_step = look
    assert trainer.run().finished
    assert all(map(torch.equal, before["before"], before["after"]))
    assert len(seen.messages) == 1
    assert f"step {FIRST_SPIKE + 2}: " in seen.messages[0]
    assert seen.messages[0].endswith("nothing was learned from it")
    assert not all(map(torch.equal, before["after"], trainer.model.parameters()))


def test_many_bad_steps_bring_the_run_back_to_a_checkpoint_past_the_data(settings) -> None:
    seen = Listening()
    config = settings(steps=20, save_every=4)
    trainer = Trainer(config, seen)
    spoil(trainer, set(range(6, 6 + BAD_STEPS)))
    positions = []
    plain = trainer.feed.next
    trainer.feed.next = lambda: (plain(), positions.append(trainer.feed.state_dict()))[0]
    assert trainer.run().finished
    # steps 1-5 are good, 6-15 are not, and the run goes on as step 5 from the checkpoint of step 4
    assert [s.step for s in seen.steps] == [*range(1, 16), *range(5, 21)]
    assert "step 15: 10 bad steps; back to " in seen.messages[BAD_STEPS]
    assert "step-00000004" in seen.messages[BAD_STEPS]
    assert len({tuple(p.values()) for p in positions}) == len(positions) == 31  # no data twice
    lines = [x["step"] for x in read_metrics(config.out_folder / "metrics.jsonl") if "loss" in x]
    assert lines == list(range(1, 21))
    assert load_checkpoint(config.out_folder).step == 20


def test_a_checkpoint_from_which_only_bad_steps_follow_is_given_up(settings) -> None:
    seen = Listening()
    config = settings(steps=30, save_every=2, spike=0.0)
    trainer = Trainer(config, seen)
    spoil(trainer, set(range(5, 5 + 2 * BAD_STEPS)))
    assert trainer.run().finished
    back = [m for m in seen.messages if "back to" in m]
    assert "step-00000004" in back[0]
    assert "step-00000002" in back[1]


# ---- the folder ----


def test_two_runs_in_one_folder(settings, tmp_path: Path) -> None:
    trainer = Trainer(settings())
    with pytest.raises(ConfigError, match=r"out: .*run is in use by process \d+ on .*; let it end, or choose another"):
        Trainer(settings(resume="auto"))
    trainer.run()
    assert not (settings().out_folder / ".lock").exists()
    code = (
        "import sys, time; from pathlib import Path; from bigmodel_fast.train.lock import RunLock;"
        "lock = RunLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, env={"PYTHONPATH": ":".join(sys.path)}
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=rf"in use by process {other.pid} on "):
            RunLock(tmp_path)
    finally:
        other.kill()
        other.wait()
    RunLock(tmp_path).release()  # the lock of a process that was killed is gone


def test_a_folder_that_is_read_only() -> None:
    from bigmodel_fast.train.setup import open_folder

    with pytest.raises(ConfigError, match=r"out: cannot write to /proc/run"):
        open_folder(Path("/proc/run"))


# ---- writing in the background ----


def test_training_goes_on_while_a_checkpoint_is_written(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    later = threading.Event()
    plain = saver.write_checkpoint

    def slow(*args):
        if args[1] == 2:
            assert later.wait(10)
        return plain(*args)

    kept = settings("kept", save_every=2, steps=3, async_save=False)
    pretrain(kept)
    monkeypatch.setattr(saver, "write_checkpoint", slow)
    config = settings(save_every=2, steps=3)
    pretrain(config, Act(3, later.set))  # step 3 comes while step 2 waits
    for name in ("model.safetensors", "optimizer.safetensors"):  # of step 2, though step 3 has changed the weights
        paths = [c.out_folder / "checkpoints" / "step-00000002" / name for c in (config, kept)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_what_fails_in_the_background_ends_the_run(settings, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = saver.write_checkpoint

    def full(*args):
        if args[1] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*args)

    monkeypatch.setattr(saver, "write_checkpoint", full)
    with pytest.raises(TrainError, match=r"cannot write to .*No space left on device.*step-00000002"):
        pretrain(settings(save_every=2))
    assert load_checkpoint(settings().out_folder).step == 2


def test_the_best_are_kept(settings) -> None:
    config = settings(steps=8, save_every=1, eval_every=1, keep=1, keep_best=1)
    trainer = Trainer(config)
    plain = trainer._evaluate

    def evaluate() -> None:
        plain()
        loss = abs(trainer.step - 3.0)
        trainer.evaluation = type(trainer.evaluation)(trainer.step, loss, 1.0, 1.0)

    trainer._evaluate = evaluate
    trainer.run()
    kept = sorted(p.name for p in (config.out_folder / "checkpoints").glob("step-*"))
    assert kept == ["step-00000003", "step-00000008"]

"""Kills training runs (SIGKILL) at random instants, half of them in mid-save, and resumes them, again and again.

    python tests/crash.py --kills 200

After every kill the newest checkpoint must be whole, none may be damaged, and weights, optimizer states, random
numbers and position must be those, bit for bit, that a run without kills has at that step. Runs are forked from a
process that has imported everything, so that each costs a fraction of a second. Exit code 0: all of it holds.
"""

import argparse
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from bigmodel_fast.train import TrainConfig, newest_checkpoint, pretrain, read_metrics, saver

STEPS, SAVE_EVERY = 120, 2
LIFE = 0.6  # seconds within which a run is killed
BEGUN, ENDED = b"(", b")"


def config(folder: Path, out: str, keep: int) -> TrainConfig:
    return TrainConfig.from_dict(
        {
            "data": str(folder / "corpus"), "cache": str(folder / "cache"), "out": str(folder / out),
            "tokenizer": "bytes", "steps": STEPS, "save_every": SAVE_EVERY, "eval_every": 10_000, "keep": keep,
            "resume": "auto", "dtype": "fp32", "threads": 1,
            "model": {"layers": 1, "heads": 2, "width": 64, "context": 16},
            "optim": {"batch": 4, "accumulation": 2, "warmup": 2, "lr": 1e-2},
        }
    )  # fmt: skip


def start(settings: TrainConfig) -> tuple[int, int]:
    """A process that trains; its id, and a pipe in which it says when it begins and ends to write a checkpoint."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    plain = saver.write_checkpoint

    def told(*args, **kwargs):
        os.write(write, BEGUN)
        path = plain(*args, **kwargs)
        os.write(write, ENDED)
        return path

    saver.write_checkpoint = told
    code = 1
    try:
        pretrain(settings)
        code = 0
    finally:
        os._exit(code)


def wait_for_save(pipe: int, number: int, until: float) -> bytes:
    """What the pipe says, up to the beginning of the `number`-th save or the end of the run."""
    heard = b""
    while heard.count(BEGUN) < number and (left := until - time.monotonic()) > 0:
        if not select.select([pipe], [], [], left)[0]:
            break
        if not (new := os.read(pipe, 1)):
            break
        heard += new
    return heard


def rest_of(pipe: int) -> bytes:
    heard = b""
    while new := os.read(pipe, 1024):
        heard += new
    os.close(pipe)
    return heard


def bits(state: dict) -> dict:
    """What must be equal in two checkpoints of a step; sums stand for the tensors."""
    return {key: state[key] for key in ("step", "files", "batches", "random", "health", "ranks", "model")}


def run(kills: int, folder: Path, seed: int) -> dict[str, int]:
    """Kills and resumes; how many kills came in mid-save and elsewhere, and how many runs reached their end.

    Raises:
        AssertionError: a checkpoint is damaged, lost, or not that of the run without kills.
    """
    (folder / "corpus").mkdir()
    for i in range(40):
        (folder / "corpus" / f"{i}.txt").write_text(f"{i}: all work and no play makes a dull day")
    child, pipe = start(config(folder, "straight", keep=STEPS))
    assert os.waitpid(child, 0)[1] == 0, "the run without kills failed"
    rest_of(pipe)
    states = (folder / "straight" / "checkpoints").glob("step-*/state.json")
    straight = {state["step"]: bits(state) for path in states if (state := json.loads(path.read_text()))}
    assert len(straight) == STEPS // SAVE_EVERY

    draw, number, saved, finished, resumed = random.Random(seed), 0, False, 0, 0
    counts = {"mid-save": 0, "elsewhere": 0}
    typical = 0.01  # seconds that a save takes
    while min(counts.values()) < kills // 2:
        settings = config(folder, f"run{number}", keep=2)
        child, pipe = start(settings)
        heard = b""
        if counts["mid-save"] < kills // 2:
            heard = wait_for_save(pipe, draw.randint(1, 4), time.monotonic() + 10)
            time.sleep(draw.uniform(0, typical))
        else:
            time.sleep(draw.uniform(0, LIFE))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        heard += rest_of(pipe)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "a resumed run failed"
        killed, in_save = os.WIFSIGNALED(status), heard.endswith(BEGUN)
        typical *= 1.1 if in_save else 0.9
        saved = saved or ENDED in heard
        if killed:
            counts["mid-save" if in_save else "elsewhere"] += 1
        found, damage = newest_checkpoint(settings.out_folder)
        assert not damage, damage
        assert found is not None or not saved, "a checkpoint was lost"
        if found is not None:
            resumed += 1
            assert bits(found.state) == straight[found.step], f"step {found.step} has other bits"
            latest = settings.out_folder / "checkpoints" / "LATEST"
            assert not latest.exists() or (latest.parent / latest.read_text().strip()).is_dir()
            read_metrics(settings.out_folder / "metrics.jsonl")
        if not killed:
            finished, number, saved = finished + 1, number + 1, False
    return {**counts, "compared": resumed, "finished": finished}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        try:
            print(json.dumps(run(options.kills, Path(place), options.seed)))
        except AssertionError as error:
            print(f"crash.py: {error}", file=sys.stderr)
            sys.exit(1)

"""Runs over two ranks (gloo, CPU) are the run of one, saved by either and taken up by the other; ranks that die."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("safetensors", "matplotlib", "yaml", "jsonargparse", "rich"):
    pytest.importorskip(package)
if not torch.distributed.is_available():
    pytest.skip("torch without torch.distributed", allow_module_level=True)

from ranks import PARALLEL, STEPS, config, curve, objective  # noqa: E402

from bigmodel_fast.cli import main  # noqa: E402
from bigmodel_fast.train import Trainer, distributed, load_checkpoint  # noqa: E402

TOLERANCE = 1e-5  # of the losses, relative
SAVED = "checkpoints/step-00000020"


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """The folder, the curve of one rank, and what each of two ranks found (see ranks.py)."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "corpus").mkdir()
    for i in range(40):
        (folder / "corpus" / f"{i}.txt").write_text(f"{i}: all work and no play makes a dull day, {i * i} times over")
    (folder / "pairs").mkdir()
    for name, count in (("train", 40), ("val", 12)):
        lines = [("one two three " * (i % 5 + 1), "eins zwei " * (i % 7 + 1)) for i in range(count)]
        for side, language in enumerate(("en", "de")):
            (folder / "pairs" / f"{name}.{language}").write_text("".join(f"{line[side]}\n" for line in lines))
    one = curve(config(folder, "one", 8, save_every=20, keep=9))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    script = str(Path(__file__).with_name("ranks.py"))
    commands = [[sys.executable, script, str(rank), port, str(folder)] for rank in range(2)]
    pair = [subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE) for command in commands]
    errors = [process.communicate(timeout=240)[1].decode() for process in pair]
    assert [process.returncode for process in pair] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    return folder, one, [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]


def tensors(run: Path, step: int) -> dict[str, torch.Tensor]:
    """Those of a checkpoint, by file (a rank's shard is one) and name."""
    from safetensors.torch import load_file

    files = (run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
    return {f"{file.name}: {name}": t for file in files for name, t in load_file(file).items()}


def assert_same(ours: dict[str, Any], one: dict[str, Any], first: int = 0) -> None:
    assert ours["step"] == STEPS
    assert len(ours["losses"]) == STEPS - first
    assert ours["losses"] == pytest.approx(one["losses"][first:], rel=TOLERANCE)
    assert ours["evaluation"] == pytest.approx(one["evaluation"], rel=TOLERANCE)


def files(run: Path, step: int) -> dict[str, Any]:
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())["files"]


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_ranks_take_the_steps_of_one(runs, parallel: str) -> None:
    _, one, (first, _) = runs
    assert one["losses"][-1] < one["losses"][0] - 0.5  # something was learned
    assert_same(first[parallel], one)
    assert first[f"{parallel}, accumulated"]["losses"] == pytest.approx(one["losses"], rel=TOLERANCE)


@pytest.mark.parametrize("name", ["mlm", "seq2seq"])
def test_rows_of_different_numbers_of_targets_count_as_on_one_rank(runs, name: str) -> None:
    folder, _, (first, _) = runs
    one = curve(objective(folder, name, "one", 8, "ddp"))
    for parallel in PARALLEL:
        assert first[f"{parallel}, {name}"]["losses"] == pytest.approx(one["losses"], rel=TOLERANCE)
        assert first[f"{parallel}, {name}"]["evaluation"] == pytest.approx(one["evaluation"], rel=TOLERANCE)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_run_goes_on_with_another_number_of_ranks(runs, parallel: str) -> None:
    folder, one, (first, _) = runs
    assert_same(first[f"{parallel}, from one"], one, first=20)
    saved = folder / parallel / SAVED
    again = curve(config(folder, f"{parallel}-to-one", 8, parallel=parallel, resume=str(saved)))
    assert_same(again, one, first=20)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_two_ranks_resume_to_the_bit(runs, parallel: str) -> None:
    folder, _, (first, _) = runs
    assert first[f"{parallel}, resumed"]["losses"] == first[parallel]["losses"][20:]
    straight, resumed = (tensors(folder / name, STEPS) for name in (parallel, f"{parallel}-resumed"))
    assert straight.keys() == resumed.keys()
    for name, t in straight.items():
        assert torch.equal(t, resumed[name]), name


def test_shards_are_safetensors_and_are_exported_as_one(runs, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder, _, _ = runs
    names = sorted(files(folder / "fsdp", 20))
    assert [n for n in names if n.startswith("shard-")] == [n for n in names if n.endswith(".safetensors")]
    assert len(names) == 3
    argv = ["--path", str(folder / "fsdp" / SAVED), "--out", str(tmp_path / "model.safetensors")]
    assert main(["export", *argv]) == 0
    weights = load_file(tmp_path / "model.safetensors")
    model = load_checkpoint(folder / "fsdp" / SAVED).model()
    one = load_file(folder / "one" / SAVED / "model.safetensors")
    assert weights.keys() == one.keys()
    for name, p in model.state_dict().items():
        assert torch.equal(p, weights[name])
        torch.testing.assert_close(p, one[name], rtol=1e-3, atol=1e-5)


def test_ranks_read_disjoint_rows_of_one_order(runs) -> None:
    folder, _, found = runs
    trainer = Trainer(config(folder, "rows-of-one", 4))
    whole = [trainer.feed.next()[0].tolist() for _ in range(4)]
    assert [a + b for a, b in zip(found[0]["rows"], found[1]["rows"], strict=True)] == whole


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_optimizers_step_shards_as_whole_tensors(runs, name: str) -> None:
    clip = {"AdamW": "clip_grad_norm", "SGD": "clip_grad_norm_"}[name]
    for rank in runs[2]:
        found = rank["optimizers"][name]
        assert found["error"] < 1e-4
        assert found["norms"][1] == pytest.approx(found["norms"][0], rel=1e-5)
        assert found["paths"] == [f"{name} native", f"{clip} native"]


def test_layers_that_run_again_give_the_same_bits(runs) -> None:
    for rank in runs[2]:
        assert len(rank["recomputed"]) == 4
        assert all(rank["recomputed"].values()), rank["recomputed"]


def test_operators_take_weights_split_by_heads_and_hidden_units(runs) -> None:
    for rank in runs[2]:
        for name in ("tensor parallel", "tensor parallel, fsdp"):
            found = rank[name]
            assert max(found["output"], found["input"], found["gradients"]) < 1e-4
            assert found["placements"]
            assert found["paths"] == ["native"]
        assert rank["tensor parallel"]["communicated"] == ["all_reduce"]  # nothing was gathered


def test_gradients_are_averaged_once_a_step(runs) -> None:
    counts = runs[2][0]["syncs"]
    assert counts["1"] == counts["4"] > 0


# ---- commands ----

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def two_ranks(folder: Path, corpus: Path, command: list[str], steps: int) -> subprocess.Popen:
    """A run of two ranks with the options of `command`, on a tiny model, in `folder`/run."""
    options = ["--data", str(corpus), "--cache", str(folder / "cache"), "--tokenizer", "bytes", "--steps", str(steps)]
    options += ["--save-every", "50", "--model.layers", "1", "--model.heads", "2", "--model.width", "32"]
    options += ["--model.context", "16", "--optim.batch", "2", "--out", str(folder / "run")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command, *options], env=environment(), **pipes)


def launched(folder: Path, corpus: Path, *more: str) -> subprocess.Popen:
    command = ["-m", "bigmodel_fast", "pretrain", "--launch", "2", "--log-every", "1", *more]
    return two_ranks(folder, corpus, command, steps=100_000)


def until(process: subprocess.Popen, words: str) -> str:
    assert process.stdout is not None
    heard = ""
    for line in process.stdout:
        heard += line
        if words in line:
            return heard
    raise AssertionError(heard + process.stderr.read())


def children(process: subprocess.Popen) -> list[int]:
    return [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_sigterm_saves(corpus: Path, tmp_path: Path) -> None:
    process = launched(tmp_path, corpus)
    until(process, "saved ")
    os.kill(children(process)[1], signal.SIGKILL)
    started = time.monotonic()
    out, error = process.communicate(timeout=60)
    assert time.monotonic() - started < 30
    assert process.returncode == 1
    assert "Traceback" not in error
    assert "rank 1 was killed by signal 9" in error
    assert re.search(r"pretrain: step \d+: rank 0 ends, another rank is gone; go on with --resume auto", error)
    assert load_checkpoint(tmp_path / "run").step % 50 == 0

    process = launched(tmp_path, corpus, "--resume", "auto")
    heard = until(process, "  loss ")
    assert "resumed after step" in heard
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert re.search(
        r"stopped after step \d+; saved .*step-\d+\nto go on: bigmodel-fast pretrain --config \S+ --res", out
    )
    assert load_checkpoint(tmp_path / "run").state["ranks"] == 2
    assert out.count("stopped after") == 1


@pytest.mark.slow
def test_torchrun_starts_all_again_when_a_rank_is_killed(corpus: Path, tmp_path: Path) -> None:
    options = ["--max-restarts", "1", "-m", "bigmodel_fast", "pretrain", "--resume", "auto", "--log-every", "1"]
    process = two_ranks(tmp_path, corpus, [*TORCHRUN, *options], steps=600)
    until(process, "saved ")
    os.kill(children(process)[1], signal.SIGKILL)
    heard = until(process, "resumed after step")
    assert re.search(r"resumed after step [1-9]", heard)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert "finished at step 600" in out
    assert load_checkpoint(tmp_path / "run").state["ranks"] == 2


def test_no_thread_of_a_group_outlives_it(corpus: Path, tmp_path: Path) -> None:
    """One that still held a tensor when the interpreter ended would abort the process."""
    script = tmp_path / "threads.py"
    script.write_text("""
import pathlib, sys
from bigmodel_fast.cli import main

if __name__ == "__main__":
    assert main(["pretrain", *sys.argv[1:]]) == 0
    print("threads:", *(t.read_text().strip() for t in pathlib.Path("/proc/self/task").glob("*/comm")))
""")
    out, error = two_ranks(tmp_path, corpus, [*TORCHRUN, str(script)], steps=2).communicate(timeout=120)
    threads = re.findall(r"threads: (.*)", out)
    assert len(threads) == 2, error
    assert "gloo" not in "".join(threads)


def test_ranks_started_again_do_not_read_what_dead_ones_left() -> None:
    """In torchrun's store, which outlives a restart; a rank may be early, or have died before the others came."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))

    def ask(rank: int, delay: float = 0.0) -> str:
        time.sleep(delay)
        client = torch.distributed.TCPStore("127.0.0.1", store.port, is_master=False, timeout=store.timeout)
        return distributed.agree(client, rank, 3)

    with ThreadPoolExecutor(3) as ranks:
        store.set("attempt/asks/2", "what one asked that died")
        words = set()
        for late in range(3):
            attempt = [ranks.submit(ask, rank, 0.3 * (rank == late)) for rank in range(3)]
            word, *same = (found.result(timeout=30) for found in attempt)
            assert same == [word, word]
            words.add(word)
        assert len(words) == 3

    store.set_timeout(timedelta(seconds=0.5))
    with pytest.raises(TimeoutError, match=r"ranks \[1, 2\] did not come within 0.5 s"):
        distributed.agree(store, 0, 3)


def test_bad_settings_of_a_launch_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for argv, words in (
        (["--launch", "0"], "launch must be 1 or more, got 0"),
        (["--launch", "2", "--optim.lr", "-1"], "optim.lr must be more than 0"),
        (["--parallel", "tensor"], "parallel: expected 'ddp', 'fsdp', got tensor"),
    ):
        assert main(["pretrain", "--out", str(tmp_path), *argv]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert words in lines[0]
    assert not distributed.launched()

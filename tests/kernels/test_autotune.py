"""Launch choices by measurement, with a clock that is told what to show: no GPU is timed here."""

import json
import multiprocessing
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from bigmodel_fast.kernels import _dense, attention, autotune, gemm, launch
from triton.runtime.errors import OutOfResources

A, B, C = (gemm.Blocks(16 * i, 64, 64, 4, 3) for i in (1, 2, 3))
TIMES = {None: 4.0, A: 3.0, B: 1.0, C: 2.0}


class Clock:
    """Times the last candidate that was started by a table, and counts how many it was asked for."""

    def __init__(self, times: dict = TIMES) -> None:
        self.times, self.started = times, []

    def start(self, candidate: object) -> None:
        self.started.append(candidate)

    def __call__(self, start: Callable[[], object]) -> float:
        start()
        time = self.times[self.started[-1]]
        if time is None:
            raise OutOfResources(300_000, 232_448, "shared memory")
        return time


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_the_fastest_is_picked_and_kept(tmp_path: Path) -> None:
    path, clock = tmp_path / "deep" / "choices.json", Clock()
    tuner = autotune.Tuner(path, clock)
    assert tuner.pick("layer 1", (None, A, B, C), clock.start) == B
    assert clock.started == [None, A, B, C]
    assert tuner.pick("layer 1", (None, A, B, C), clock.start) == B
    later = autotune.Tuner(path, clock)
    assert later.pick("layer 1", (None, A, B, C), clock.start) == B
    assert len(clock.started) == 4
    assert later.pick("layer 2", (A, None), clock.start) == A
    assert json.loads(path.read_text())["choices"]["layer 1"]["rows"] == B.rows
    assert [p.name for p in path.parent.iterdir()] == ["choices.json"]


def test_none_is_a_choice_like_others(tmp_path: Path) -> None:
    clock = Clock({None: 1.0, A: 2.0})
    for _ in range(2):
        tuner = autotune.Tuner(tmp_path / "choices.json", clock)
        assert tuner.pick("layer", (A, None), clock.start) is None
    assert len(clock.started) == 2


def test_what_does_not_fit_is_passed_over(tmp_path: Path) -> None:
    clock = Clock({A: None, B: 2.0, C: None})
    tuner = autotune.Tuner(tmp_path / "choices.json", clock)
    assert tuner.pick("some", (A, B), clock.start) == B
    assert tuner.pick("none", (A, C), clock.start) == A


def test_a_choice_that_is_no_candidate_any_more_is_made_anew(tmp_path: Path) -> None:
    path, clock = tmp_path / "choices.json", Clock()
    autotune.Tuner(path, clock).pick("layer", (A, B), clock.start)
    assert autotune.Tuner(path, clock).pick("layer", (A, C), clock.start) == C


@pytest.mark.parametrize("text", ["", "{", "[]", '{"choices": 3}', '{"choices": [1]}', "\x00"], ids=repr)
def test_a_file_that_cannot_be_read_is_told_once_and_replaced(tmp_path: Path, text: str) -> None:
    path, clock = tmp_path / "choices.json", Clock()
    path.write_text(text)
    with pytest.warns(UserWarning, match="holds no launch choices"):
        tuner = autotune.Tuner(path, clock)
    assert tuner.pick("layer", (A, B), clock.start) == B
    assert autotune.Tuner(path, clock).choices["layer"]["rows"] == B.rows


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuner = autotune.Tuner(tmp_path / "file" / "choices.json", Clock())
    with pytest.warns(UserWarning, match="lost with this process"):
        assert tuner.pick("layer", (A, B), tuner.milliseconds.start) == B
    assert tuner.pick("layer", (A, B), tuner.milliseconds.start) == B
    assert len(tuner.milliseconds.started) == 2


def test_what_others_have_found_stays(tmp_path: Path) -> None:
    path, clock = tmp_path / "choices.json", Clock()
    for i, tuner in enumerate([autotune.Tuner(path, clock) for _ in range(3)]):
        tuner.pick(f"layer {i}", (A, B), clock.start)
    assert len(json.loads(path.read_text())["choices"]) == 3


def _pick_many(path: Path, first: int) -> None:
    clock = Clock()
    tuner = autotune.Tuner(path, clock)
    for i in range(first, first + 20):
        tuner.pick(f"layer {i}", (A, B), clock.start)


def test_processes_share_a_file(tmp_path: Path) -> None:
    """A reader never meets half a file; a choice may be lost where two write at once, and is made again."""
    path = tmp_path / "choices.json"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_pick_many, args=(path, 20 * i)) for i in range(2)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if path.exists():
            json.loads(path.read_text())
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(json.loads(path.read_text())["choices"]) >= 20


def test_nothing_is_timed_unless_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clock, t = Clock(), torch.empty(1)
    monkeypatch.setattr(autotune, "_tuner_for", lambda t: autotune.Tuner(tmp_path / "choices.json", clock))
    assert not autotune.ENABLED
    assert autotune.pick("layer", (1,), (A, B), clock.start, t) == A
    monkeypatch.setattr(autotune, "ENABLED", True)
    assert autotune.pick("layer", (1,), (A,), clock.start, t) == A
    assert not clock.started
    assert autotune.pick("layer", (1, torch.bfloat16), (A, B), clock.start, t) == B
    assert list(json.loads((tmp_path / "choices.json").read_text())["choices"]) == ["layer float32 1 bfloat16"]


def test_nothing_is_timed_off_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "ENABLED", True)
    clock = Clock()
    assert autotune.pick("layer", (), (A, B), clock.start, torch.empty(1, device="meta")) == A
    assert not clock.started


@pytest.mark.parametrize("cache", [None, "somewhere"])
def test_a_file_for_each_gpu_driver_and_triton(
    cache: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    root = tmp_path / ".cache"
    if cache:
        root = tmp_path / cache
        monkeypatch.setenv("XDG_CACHE_HOME", str(root))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    path = autotune._file_of(torch.device("cuda", 0))
    assert path.parent == root / "bigmodel_fast" / "autotune"
    assert path.name.startswith("NVIDIA-H100-80GB-HBM3-")
    assert autotune.triton.__version__ in path.name


def test_a_layer_takes_what_was_faster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """cuBLAS is the first candidate, and stays where nothing is faster."""
    x, weight = (torch.empty(n, 64, dtype=torch.float16, device="meta") for n in (256, 128))
    started: list = []
    monkeypatch.setattr(launch, "run", lambda kernel, *rest: started.append(kernel.__name__))
    monkeypatch.setattr(autotune, "ENABLED", True)
    for faster in ("_activate", "_gemm"):

        def clock(start: Callable[[], object], faster: str = faster) -> float:
            start()
            return 1.0 if started[-1] == faster else 2.0

        tuner = autotune.Tuner(tmp_path / faster, clock)
        monkeypatch.setattr(autotune, "_tuner_for", lambda t, tuner=tuner: tuner)
        for _ in range(2):
            started.clear()
            _dense.layer(x, weight, None, "relu", True)
        assert started == [faster]


def test_attention_takes_the_tiles_that_were_fastest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    q = torch.empty(2, 300, 4, 64, dtype=torch.float16, device="meta").transpose(1, 2)
    options = (None, None, None, None, None, None, 0.125, 0.0, 1 << 40, 0, 0.0)
    keys: list[int] = []
    monkeypatch.setattr(launch, "run", lambda kernel, grid, arguments, constants, *rest: keys.append(constants["KEYS"]))

    def clock(start: Callable[[], object]) -> float:
        start()
        return float(keys[-1])

    with launch.assume(launch.H100):
        attention.attention_fwd(q, q, q, *options)
        assert keys == [128]
        monkeypatch.setattr(autotune, "ENABLED", True)
        tuner = autotune.Tuner(tmp_path / "choices.json", clock)
        monkeypatch.setattr(autotune, "_tuner_for", lambda t: tuner)
        out, stats = attention.attention_fwd(q, q, q, *options)
        assert sorted(keys[1:]) == [64, 64, 128, 128]
        keys.clear()
        attention.attention_fwd(q, q, q, *options)
        assert keys == [64]
        attention.attention_bwd(out, q, q, q, out, stats, *options, [], True)
    assert set(tuner.choices) == {
        f"{kernel} float16 8 512 512 1 64 0 RIGHT=True" for kernel in ("forward", "query_gradient", "key_gradients")
    }


@pytest.mark.parametrize(("value", "expected"), [("1", True), ("0", False), ("", False), (None, False)])
def test_switches(value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BMF_X", raising=False)
    if value is not None:
        monkeypatch.setenv("BMF_X", value)
    assert launch.switch("BMF_X") is expected
    monkeypatch.setenv("BMF_X", "yes")
    with pytest.raises(ValueError, match="BMF_X must be 0 or 1, not 'yes'"):
        launch.switch("BMF_X")

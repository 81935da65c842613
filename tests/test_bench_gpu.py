"""The command that finds out about a GPU: what it does with checks that fail, crash and hang, and what it writes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bigmodel_fast.benchmarks import engine, gpu, gpu_checks, gpu_worker
from bigmodel_fast.benchmarks.gpu_report import BAD, Findings, Outcome

from bigmodel_fast import benchmarks

CPU = torch.device("cpu")
WORKER = """
import json, os, sys, time
path, skip = sys.argv[1], int(sys.argv[2])
names = ["good", "wrong", "segfault", "behind it", "poison", "hang", "last"]
with open(path, "a") as file:
    def write(**line):
        print(json.dumps(line), file=file, flush=True)
    if skip == 0:
        write(plan=names)
    for name in names[skip:]:
        write(begin=name)
        if name == "segfault":
            print("an illegal memory access", flush=True)
            os.abort()
        if name == "hang":
            time.sleep(1000)
        status = "failed" if name in ("wrong", "poison") else "ok"
        write(done=name, status=status, detail="off by 3" if status == "failed" else "", seconds=0.5)
        if name == "poison":
            sys.exit(3)
"""


class Scripted(gpu.Job):
    """A job whose worker is WORKER."""

    def command(self, skip: int) -> list[str]:
        script = self.folder / "worker.py"
        script.write_text(WORKER)
        return [sys.executable, str(script), str(self.record), str(skip)]


def machine() -> dict:
    known = {"gpu": "a GPU", "driver": "1.2", "cuda": "13.0", "triton": "3.6", "torch": "2.11", "python": "3.10"}
    return known | {"bigmodel_fast": "0", "commit": "abc", "date": "2026-11-25", "command": "gpu"}


# ---- jobs ----


def test_a_job_goes_on_behind_what_crashes_or_hangs(tmp_path: Path) -> None:
    job, saved = Scripted("facts:0/1", tmp_path, stall=1.0), []
    gpu.run([job], 2, time.monotonic() + 60, lambda: saved.append(len(job.outcomes())))
    assert job.ended
    found = {o.name: o for o in job.outcomes()}
    assert {name: o.status for name, o in found.items()} == {
        "good": "ok",
        "wrong": "failed",
        "segfault": "crashed",
        "behind it": "ok",
        "poison": "failed",
        "hang": "timed out",
        "last": "ok",
    }
    assert "an illegal memory access" in found["segfault"].detail
    assert found["wrong"].detail == "off by 3"
    assert all(o.section == "facts" for o in found.values())
    assert saved[-1] == 7


def test_what_is_cut_off_never_ran_and_can_be_taken_up(tmp_path: Path) -> None:
    job = Scripted("facts:0/1", tmp_path, stall=60.0)
    gpu.run([job], 1, time.monotonic() + 2.5, lambda: None)
    statuses = {o.name: o.status for o in job.outcomes()}
    assert (statuses["hang"], statuses["last"]) == ("never ran", "never ran")
    assert job.process is not None
    assert job.process.poll() is not None
    assert not job.ended
    job.stall = 0.5
    gpu.run([job], 1, time.monotonic() + 60, lambda: None)
    assert [o.status for o in job.outcomes()][-2:] == ["timed out", "ok"]


def test_a_job_over_its_limit_goes_on_when_the_limit_is_lifted(tmp_path: Path) -> None:
    job = Scripted("table:gpt", tmp_path, limit=2.5, stall=60.0)
    gpu.run([job], 1, time.monotonic() + 60, lambda: None)
    assert job.ended
    assert [o.status for o in job.outcomes()][-2:] == ["never ran", "never ran"]
    job.unlimit()
    job.stall = 0.5
    gpu.run([job], 1, time.monotonic() + 60, lambda: None)
    assert [o.status for o in job.outcomes()][-2:] == ["timed out", "ok"]


def test_a_job_that_cannot_begin_or_crashes_again_and_again_is_given_up(tmp_path: Path) -> None:
    class Broken(gpu.Job):
        def command(self, skip: int) -> list[str]:
            return [sys.executable, "-c", "raise SystemExit('no driver')"]

    job = Broken("facts:0/1", tmp_path)
    gpu.run([job], 1, time.monotonic() + 60, lambda: None)
    assert [(o.name, o.status) for o in job.outcomes()] == [("facts:0/1", "crashed")]
    assert "no driver" in job.outcomes()[0].detail

    class Crashing(gpu.Job):
        def command(self, skip: int) -> list[str]:
            plan = json.dumps({"plan": [f"c{i}" for i in range(20)]}) if skip == 0 else ""
            line = json.dumps({"begin": f"c{skip}"})
            return ["sh", "-c", f"printf '%s\\n%s\\n' '{plan}' '{line}' >> {self.record}; exit 9"]

    job = Crashing("numerics:0/1", tmp_path)
    gpu.run([job], 1, time.monotonic() + 60, lambda: None)
    statuses = [o.status for o in job.outcomes()]
    assert statuses == ["crashed"] * gpu.CRASHES + ["never ran"] * (20 - gpu.CRASHES)
    assert job.outcomes()[-1].detail == f"given up after {gpu.CRASHES} crashes"


@pytest.mark.parametrize(
    ("log", "status", "words"),
    [
        ("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", "ok", "0 in 2 of 3 calls"),
        (
            "========= Invalid __global__ read of size 2 bytes\n=========     at _forward+0x40\n"
            "========= ERROR SUMMARY: 4 errors\n",
            "failed",
            "4 in 2 of 3 calls; Invalid __global__ read of size 2 bytes at _forward+0x40",
        ),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n", "failed", "1 in 2 of 3 calls"),
        ("cannot attach to the process\n", "crashed", "cannot attach"),
        ("========= ERROR SUMMARY: 0 errors\n========= ERROR SUMMARY: 3 errors\n", "failed", "3 in 2 of 3 calls"),
    ],
)
def test_what_a_sanitizer_says(log: str, status: str, words: str, tmp_path: Path) -> None:
    job = gpu.Job("memcheck", tmp_path, wrapped=("compute-sanitizer",), ended=True, spent=3.0)
    job.process = subprocess.Popen(["true"])
    job.process.wait()
    lines = [{"plan": ["a", "b", "c"]}, *({"done": n, "status": "ok", "detail": "", "seconds": 1.0} for n in "ab")]
    job.record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    job.log.write_text(log)
    (found,) = job.outcomes()
    assert (found.section, found.name, found.status) == ("sanitizer", "memcheck", status)
    assert words in found.detail
    if status != "failed":
        job.ended = False
        assert job.outcomes()[0].status == "never ran"
        job.fates["c"] = "timed out", "no sign of life for 200 s"
        assert job.outcomes()[0].status == "timed out"


def test_the_plan_has_every_table_and_says_why_there_is_no_sanitizer(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(gpu, "sanitizer", lambda: None)
    checks, tables, missing = gpu.plan(tmp_path, 4)
    assert [job.name for job in tables][:2] == ["table:gpt", "table:attention"]
    assert sorted(job.name for job in tables) == [f"table:{name}" for name in benchmarks.names()]
    assert {job.section for job in checks} == {"numerics", "facts", "determinism", "prepare"}
    assert {o.status for o in missing} == {"skipped"}
    assert "CUDA_HOME" in missing[0].detail
    assert [job.name for job in gpu.selected(checks + tables, ["determinism", "table:gpt"])] == [
        "determinism:0/2",
        "determinism:1/2",
        "table:gpt",
    ]
    monkeypatch.setattr(gpu, "sanitizer", lambda: "/opt/compute-sanitizer")
    checks, _, missing = gpu.plan(tmp_path, 4)
    assert not missing
    commands = [job.command(0) for job in checks if job.wrapped]
    assert [c[:3] for c in commands] == [["/opt/compute-sanitizer", "--tool", t] for t in gpu.SANITIZERS]
    assert all("sanitize" in c for c in commands)


def test_the_sanitizer_of_a_cuda_toolkit_is_found(tmp_path: Path, monkeypatch) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu.sanitizer() == str(tool)


# ---- results ----


def test_results_say_what_failed_and_what_never_ran(tmp_path: Path) -> None:
    gpt = benchmarks.load("gpt").cuda_cases[0]
    times = {"seconds": 0.1, "low": 0.1, "high": 0.1, "samples": 5, "rate": 2e14, "unit": "FLOP", "error": 1e-3}
    rows = [
        engine.Row("gpt", gpt.name, "bf16", "step", "eager", speedup=1.0, extra_bytes=20 << 30, **times),
        engine.Row("gpt", gpt.name, "bf16", "step", "compile", status="failed: CUDA out of memory"),
    ]
    outcomes = [
        Outcome("facts", "dropout", "failed", "line one\nline | two " + "x" * 500),
        Outcome("facts", "streams", "ok"),
        Outcome("sanitizer", "memcheck", "skipped", "no compute-sanitizer"),
        *(Outcome("numerics", f"n{i}", "never ran", "the time was up") for i in range(7)),
    ]
    findings = Findings(machine(), outcomes, rows, {"bf16": 4e14, "fp32": 5e13, "copy": 3e12})
    findings.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "results.md"]
    text = (tmp_path / "results.md").read_text()
    for part in ("driver 1.2", "CUDA 13.0", "torch 2.11", "triton 3.6", "commit abc", "2026-11-25"):
        assert part in text
    assert "| facts | 1 | 1 |  |  |  |  |" in text
    failures = text.partition("## What is wrong")[2].partition("## What never ran")[0]
    assert "- facts: dropout: failed (line one line / two xxx" in failures
    assert "gpt2 124M, 32x1024 tokens, bf16: compile failed: CUDA out of memory" in failures
    assert "- sanitizer: memcheck: skipped (no compute-sanitizer)" in text
    assert "- numerics: 7 never ran (the time was up): n0; n1; n2; n3; n4; ...\n" in text
    assert f"| {32 * 1024 / 0.1:,.0f} | 50.0% | 20.0 GiB | 1.00x |" in text
    data = json.loads((tmp_path / "results.json").read_text())
    assert data["outcomes"][0]["detail"].endswith("x" * 500)
    assert data["rows"][0]["share"] == 0.5
    assert findings.failed
    findings.outcomes = [o for o in outcomes if o.status not in BAD]
    assert not findings.failed  # a competitor's failure is none of ours
    findings.rows[1].provider = "bigmodel_fast graph"
    assert findings.failed


def test_the_command_runs_everything_and_says_how_it_went(tmp_path: Path, monkeypatch, capsys) -> None:
    """With checks on the CPU that stand for those of a GPU: real ones of two sections, and a table."""
    jobs = [gpu.Job(name, tmp_path, device="cpu") for name in ("determinism:0/40", "numerics:3/300")]
    table = Scripted("table:gpt", tmp_path, stall=1.0)
    skipped = [Outcome("sanitizer", "memcheck", "skipped", "there is none")]
    monkeypatch.setattr(gpu, "plan", lambda folder, at_once: (jobs, [table], skipped))
    monkeypatch.setattr(gpu, "machine", lambda device, command: machine() | {"command": command})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert gpu.main(["--budget", "2", "--out", str(tmp_path / "out"), "--jobs", "2"]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    data = json.loads((tmp_path / "out" / "results.json").read_text())
    statuses = {o["name"]: o["status"] for o in data["outcomes"] if o["section"] == "table"}
    assert statuses["segfault"] == "crashed"
    others = [o for o in data["outcomes"] if o["section"] in ("determinism", "numerics")]
    assert len(others) >= 3
    assert {o["status"] for o in others} == {"ok"}
    assert data["machine"]["command"].startswith("python -m bigmodel_fast.benchmarks.gpu --budget 2")
    printed = capsys.readouterr().out
    assert "| sanitizer |  |  |  |  | 1 |  |" in printed
    assert f"written to {tmp_path}/out/results.md" in printed


@pytest.mark.parametrize("arguments", [["--budget", "0"], ["--budget", "x"], ["--nothing"]], ids=str)
def test_bad_options_of_the_command(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as end:
        gpu.main(arguments)
    assert end.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [["benchmarks/gpu.py"], ["-m", "bigmodel_fast.benchmarks.gpu"]], ids=str)
def test_without_a_gpu_it_is_one_line(command: list[str], tmp_path: Path) -> None:
    root = Path(benchmarks.__file__).parent.parent
    if command[0].endswith(".py"):
        command = [str(root / command[0])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, *command, "--out", str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu: torch finds no CUDA device here\n"
    assert not (tmp_path / "out").exists()


# ---- the worker ----


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_worker_writes_what_it_does(tmp_path: Path, monkeypatch) -> None:
    def wrong() -> None:
        raise AssertionError("off by 3")

    def impossible() -> None:
        raise gpu_checks.Skip("one GPU only")

    checks = [("a", lambda: "fine"), ("b", wrong), ("c", impossible), ("d", lambda: {"rows": [1]})]
    monkeypatch.setitem(gpu_worker.KINDS, "facts", lambda device: iter(checks))
    path = tmp_path / "facts.jsonl"
    assert gpu_worker.work("facts", path, 0, CPU) == 0
    found = lines(path)
    assert found[0] == {"plan": ["a", "b", "c", "d"]}
    assert [line["begin"] for line in found if "begin" in line] == ["a", "b", "c", "d"]
    done = [line for line in found if "done" in line]
    assert [(line["status"], line["detail"]) for line in done] == [
        ("ok", "fine"),
        ("failed", "AssertionError: off by 3"),
        ("skipped", "one GPU only"),
        ("ok", ""),
    ]
    assert done[3]["rows"] == [1]
    assert gpu_worker.work("facts:1/2", path, 1, CPU) == 0
    assert lines(path)[-1]["done"] == "d"


def test_a_gpu_that_has_failed_ends_the_worker_behind_its_check(tmp_path: Path, monkeypatch) -> None:
    def fault() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(gpu_worker.KINDS, "facts", lambda device: iter([("a", fault), ("b", fault)]))
    monkeypatch.setattr(gpu_worker, "usable", lambda device: False)
    path = tmp_path / "facts.jsonl"
    assert gpu_worker.work("facts", path, 0, CPU) == gpu_worker.POISONED
    assert [line["done"] for line in lines(path) if "done" in line] == ["a"]


def test_the_whole_specification_is_in_numerics(tmp_path: Path) -> None:
    """On the CPU here: a shard's checks pass; without the tests' folder they are skipped."""
    from specs import all_specs, cases

    every = [name for name, _ in gpu_worker.checks_of("numerics:0/1", CPU)]
    assert len(set(every)) == len(every)
    for spec, sample in cases():
        for dtype in ("bf16", "fp16", "fp32"):
            assert f"{spec}, {sample}, {dtype}" in every
    for spec in all_specs():
        assert [name for name in every if name.startswith(f"{spec}, ") and name.endswith("autocast bf16")]
    few = [
        check for name, check in gpu_worker.checks_of("numerics:0/1", CPU) if name.startswith(("rms_norm, 4", "mlp"))
    ]
    assert len(few) > 5
    for check in few[:6]:
        check()


def test_numerics_that_are_wrong_are_found(monkeypatch) -> None:
    from bigmodel_fast import ops

    monkeypatch.setattr(ops, "rms_norm", lambda x, weight, **o: ops.layer_norm(x, weight, torch.zeros_like(weight)))
    check = dict(gpu_worker.checks_of("numerics:0/1", CPU))["rms_norm, 4x6-6-eps=1e-06, fp32"]
    with pytest.raises(AssertionError, match=r"rms_norm .* output 0: error"):
        check()


def test_numerics_need_the_source_tree(tmp_path: Path, monkeypatch) -> None:
    from bigmodel_fast.benchmarks import gpu_numerics

    monkeypatch.setattr(gpu_numerics, "TESTS", tmp_path)
    path = tmp_path / "numerics.jsonl"
    assert gpu_worker.work("numerics:0/8", path, 0, CPU) == 0
    assert lines(path)[-1]["status"] == "skipped"
    assert "source tree" in lines(path)[-1]["detail"]


def test_a_table_is_a_check_for_each_case_and_dtype(monkeypatch) -> None:
    from bigmodel_fast.benchmarks.devices import Cpu

    monkeypatch.setattr(Cpu, "peaks", lambda self: {"bf16": 1.0, "fp32": 2.0, "copy": 3.0})
    monkeypatch.setattr(Cpu, "extra_memory", lambda *_: None)
    checks = dict(gpu_worker.checks_of("table:rotary", CPU))
    assert len(checks) == 2 * len(benchmarks.load("rotary").cases)
    found = checks["rotary: 1x12/12x1x64, fp32"]()
    assert found["peaks"]["copy"] == 3.0
    assert {(row["case"], row["dtype"]) for row in found["rows"]} == {("1x12/12x1x64", "fp32")}
    assert {row["status"] for row in found["rows"]} == {"ok"}


@pytest.mark.parametrize("name", ["attention", "rotary"])
def test_the_same_bits_each_time_is_a_check_that_can_fail(name: str, monkeypatch) -> None:
    benchmark = benchmarks.load(name)
    assert gpu_checks.repeated(benchmark, benchmark.tiny, "bf16", CPU) == f"{gpu_checks.REPEATS} runs"
    ours = benchmark.functions["bigmodel_fast"]

    def noisy(**arguments):
        y = ours(**arguments)
        return tuple(t + 0.01 * torch.rand(()) * t for t in y) if isinstance(y, tuple) else y + torch.rand(()) * y

    monkeypatch.setitem(benchmark.functions, "bigmodel_fast", noisy)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: None)
    with pytest.raises(AssertionError, match="run 2: output 0 differs in"):
        gpu_checks.repeated(benchmark, benchmark.tiny, "bf16", CPU)


def test_checks_that_need_no_gpu_pass_on_the_cpu() -> None:
    checks = dict(gpu_checks.facts(CPU))
    for name in ("mlp: takes its kernel", "optim.AdamW: three steps against float64"):
        checks[name]()
    checks["optim.clip_grad_norm_: against float64"]()
    checks["attention: dropout makes the choices of the CPU"]()

"""The benchmarks: every file's providers are right, what is wrong is not timed, turns are taken, runs are compared."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bigmodel_fast.benchmarks import engine, performance, regressions, report, saving
from bigmodel_fast.benchmarks.cases import COMPILE, DTYPES, EAGER, OURS, Benchmark, Case, OpBenchmark, normal
from bigmodel_fast.benchmarks.devices import Cpu

from bigmodel_fast import benchmarks
from bigmodel_fast.cli import bench

CPU = Cpu(torch.device("cpu"))
PEAKS = {"bf16": 1e12, "fp32": 1e12, "copy": 1e10}
BRIEF = engine.Budget(seconds=0.0, least=3, most=3, warm_ups=1)


def run(benchmark: Benchmark, **selection) -> list[engine.Row]:
    rows = list(engine.measure(benchmark, CPU, engine.Selection(memory=False, **selection), BRIEF))
    engine.fill_shares(rows, PEAKS)
    return rows


def only(benchmark: Benchmark, case: Case) -> Benchmark:
    return replace(benchmark, cases=(replace(case, compiled=()),))


# ---- the page on performance ----


def test_the_page_shows_the_roof_what_is_left_and_every_loss(tmp_path: Path) -> None:
    def row(case: str, provider: str, seconds: float, **more) -> engine.Row:
        names = {"op": "linear", "dtype": "bf16", "direction": "forward"}
        numbers = {"seconds": seconds, "low": seconds, "high": seconds, "rate": 1e9, "unit": "FLOP"}
        return engine.Row(**{**names, "case": case, "provider": provider, **numbers, **more})

    rows = [
        row("wide", EAGER, 0.008, share=0.4, speedup=1.0),
        row("wide", OURS, 0.004, share=0.8, speedup=2.0),
        row("small", EAGER, 0.001, share=0.2, speedup=1.0),
        row("small", OURS, 0.002, share=0.1, speedup=0.5),
        row("broken", OURS, 0.002, share=0.1, speedup=0.5, status="wrong: 0.3"),
    ]
    machine = {"cpu": "CPU", "isa": "avx2", "threads": 2, "torch": "2", "bigmodel_fast": "0", "commit": "c"}
    found = report.Report({**machine, "date": "2026-01-01T00", "command": "bench"}, PEAKS, rows)
    found.save(tmp_path)
    page = performance.page(report.Report.load(tmp_path / "bench.json"))
    assert "| [linear](#linear) | bf16 | forward | 28% | 10% | 1.00x | 0.50x |" in page
    assert "| wide, bf16, forward | 3.2 ms | 4 ms | 80% | 800 us | 2.00x |" in page
    assert "- linear, small, bf16, forward: 0.50x (2 ms)" in page
    assert "broken" not in page
    again = replace(
        found, rows=[row("small", OURS, 0.0005, speedup=2.0), row("small", OURS, 1, direction="both", speedup=3.0)]
    )
    faster = replace(found, peaks={name: 2 * peak for name, peak in PEAKS.items()}, rows=[])
    merged = report.Report.merged([found, again, faster])
    assert "None: no case" in performance.page(merged)
    assert {r.case: r.share for r in merged.rows if r.provider == OURS}["wide"] == 1e9 / (2 * PEAKS["bf16"])
    both = [row("small", OURS, 0.003, direction="both", speedup=0.75)]
    page = performance.page(report.Report.merged([found, replace(found, rows=both)]))
    assert "- linear, small, bf16, forward: 0.50x (2 ms); forward and backward together 0.75x" in page
    with pytest.raises(ValueError, match="threads: 2 and 3"):
        report.Report.merged([found, replace(found, machine={**found.machine, "threads": 3})])


def test_the_page_needs_a_bench_json(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["performance", str(tmp_path / "none.json")])
    assert performance.main() == 2
    assert "No such file" in capsys.readouterr().err


# ---- the files ----


@pytest.mark.parametrize("name", benchmarks.names())
def test_every_provider_agrees_with_float64(name: str) -> None:
    benchmark = benchmarks.load(name)
    assert benchmark.name == name
    if benchmark.missing is not None:
        pytest.skip(benchmark.missing)
    rows = run(only(benchmark, benchmark.tiny))
    expected = [
        (dtype, direction, provider)
        for dtype in benchmark.tiny.dtypes
        for direction in benchmark.directions
        for provider in benchmark.providers_on("cpu")
        if provider != COMPILE
    ]
    assert sorted((r.dtype, r.direction, r.provider) for r in rows) == sorted(expected)
    for row in rows:
        assert row.status == "ok"
        assert row.samples == 3
        assert row.error is not None
        assert row.speedup is not None
        assert row.share is not None
        assert row.rate > 0
        assert row.low <= row.seconds <= row.high


@pytest.mark.parametrize("name", benchmarks.names())
def test_cases_have_names_of_their_own_and_some_are_quick(name: str) -> None:
    benchmark = benchmarks.load(name)
    for device in ("cpu", "cuda"):
        cases, providers = benchmark.cases_on(device), benchmark.providers_on(device)
        names = [case.name for case in (*cases, benchmark.tiny)]
        assert len(set(names)) == len(names)
        assert {OURS, EAGER} <= set(providers)
        assert any(case.quick for case in cases) or (device == "cuda" and not cases)
        assert all(set(case.compiled) <= set(case.dtypes) <= set(DTYPES) for case in cases)
        assert all({OURS, EAGER} <= set(case.providers or providers) <= set(providers) for case in cases)


def test_the_gpt_providers_start_from_the_same_loss() -> None:
    gpt = benchmarks.load("gpt")
    inputs = gpt.inputs(gpt.tiny, "fp32", CPU.device)
    losses = [gpt.task(p, gpt.tiny, inputs, "fp32").results()["output loss"] for p in (OURS, EAGER)]
    torch.testing.assert_close(*losses)


# ---- the engine ----


def squares(**functions) -> OpBenchmark:
    """A benchmark of x squared."""
    case = Case("case", {"x": normal(8)}, dtypes=("fp32",))
    return OpBenchmark(
        name="square",
        unit="FLOP",
        functions={EAGER: lambda x: x * x, **functions},
        reference=lambda x: x * x,
        count=lambda x: (8.0, 16.0),
        cases=(case,),
        cuda_cases=(),
        tiny=case,
    )


def test_a_benchmark_whose_package_is_missing_is_skipped() -> None:
    said: list[str] = []
    benchmark = replace(squares(**{OURS: lambda x: x * x}), requires="no_such_package")
    assert list(engine.measure(benchmark, CPU, engine.Selection(), engine.QUICK, said.append)) == []
    assert said == ["square: skipped, no_such_package is not installed: pip install 'bigmodel_fast[no_such_package]'"]
    assert run(replace(benchmark, requires="torch"))


def test_a_wrong_provider_is_named_and_not_timed() -> None:
    calls = []

    def wrong(x):
        calls.append(x)
        return x * x * 1.001

    rows = {(r.provider, r.direction): r for r in run(squares(**{OURS: lambda x: x.pow(2), "other": wrong}))}
    assert len(calls) == 1
    for direction in ("forward", "backward", "both"):
        assert rows[OURS, direction].status == "ok"
        assert rows["other", direction].status.startswith("wrong: output 0 is off by 1.0e-03")
        assert rows["other", direction].seconds is None
        assert rows["other", direction].speedup is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: (x * x).detach() + x,  # right nowhere in backward
        lambda x: x * x + torch.nan,
        lambda x: (x * x)[:4],
    ],
)
def test_wrong_gradients_nan_and_wrong_shapes_are_found(wrong) -> None:
    assert {r.status.split(":")[0] for r in run(squares(other=wrong)) if r.provider == "other"} <= {"wrong", "failed"}


def test_a_failing_provider_does_not_stop_the_others() -> None:
    def fails(x):
        raise RuntimeError("no kernel\nfor this")

    rows = run(squares(**{OURS: fails}))
    assert {r.status for r in rows if r.provider == OURS} == {"failed: no kernel"}
    assert {r.status for r in rows if r.provider == EAGER} == {"ok"}
    assert report.failures(rows)[0].provider == OURS


def test_providers_take_turns() -> None:
    assert list(engine.rotation("ABC", 3)) == list("ABCBCACAB")
    order = []

    class Traced:
        def __init__(self, name: str):
            self.name = name

        def results(self):
            return {}

        def run(self, clock, repeats):
            order.append(self.name)
            start = clock.mark()
            torch.zeros(400_000).sum()  # longer than nothing, so that it is not repeated endlessly
            return {"step": (start, clock.mark())}

    tasks: list = [(Traced(name), []) for name in "ABC"]
    engine.time_in_turns(tasks, CPU, BRIEF)
    assert order == [*"ABC", *"ABCBCACAB"]  # a warm-up each, then the rounds
    assert [len(samples) for _, samples in tasks] == [3, 3, 3]


def test_repeats_share_the_time_of_a_sample() -> None:
    runs = []

    class Counted:
        def run(self, clock, repeats):
            runs.append(repeats)
            return {"step": (0.0, 1e-4 * repeats)}

    samples: list[dict[str, float]] = []
    engine.time_in_turns([(Counted(), samples)], CPU, BRIEF)
    assert runs == [1, 10, 10, 10]
    assert [s["step"] for s in samples] == pytest.approx([1e-4] * 3)


def test_quartiles_and_geometric_means() -> None:
    assert engine.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert engine.quartiles([5.0, 1.0, 3.0, 2.0, 4.0]) == (2.0, 3.0, 4.0)
    rows = [row(case=str(i), speedup=s) for i, s in enumerate((2.0, 8.0))]
    assert engine.geometric_means(rows) == {("bf16", "both", OURS): (pytest.approx(4.0), 2)}


def test_compile_takes_part_where_a_case_wants_it_and_quick_does_not_unless_named(monkeypatch) -> None:
    monkeypatch.setattr(engine, "cannot_compile", lambda device: None)
    benchmark = squares(**{OURS: lambda x: x * x})
    case = replace(benchmark.tiny, compiled=("fp32",))
    found = engine.Selection().providers_of(benchmark, case, "fp32", CPU)
    assert found == [EAGER, OURS, COMPILE]
    assert engine.Selection(quick=True).providers_of(benchmark, case, "fp32", CPU) == [EAGER, OURS]
    named = engine.Selection(quick=True, providers=[COMPILE])
    assert named.providers_of(benchmark, case, "fp32", CPU) == [COMPILE]
    monkeypatch.setattr(engine, "cannot_compile", lambda device: "no compiler")
    assert engine.Selection().providers_of(benchmark, case, "fp32", CPU) == [EAGER, OURS]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell the peak memory")
def test_peak_memory_of_a_process_sees_what_a_provider_makes() -> None:
    """Eager holds several copies of the logits, and no pool or cache of this process can hide them."""
    benchmark = benchmarks.load("linear_cross_entropy")
    case = benchmark.case("1024x384x8192")
    logits = 1024 * 8192 * 4
    assert CPU.extra_memory(benchmark, case, EAGER, "fp32", None) > 2 * logits


# ---- reports and comparisons ----


def row(op="mlp", case="case", dtype="bf16", direction="both", provider=OURS, speedup=2.0, **fields) -> engine.Row:
    times = {"seconds": 1.0, "low": 0.9, "high": 1.2, "samples": 5, "rate": 1e9, "share": 0.5, "error": 1e-3}
    return engine.Row(op, case, dtype, direction, provider, speedup=speedup, unit="FLOP", **{**times, **fields})


def saved(folder: Path, rows: list[engine.Row]) -> Path:
    machine = report.machine(torch.device("cpu"), "bigmodel-fast bench")
    report.Report(machine, PEAKS, rows).save(folder)
    return folder / "bench.json"


def test_a_report_is_saved_and_read_again(tmp_path: Path) -> None:
    rows = [row(), row(provider=EAGER, speedup=1.0), row(op="linear", status="wrong: output 0", seconds=None)]
    path = saved(tmp_path, rows)
    assert report.Report.load(path).rows == rows
    assert {p.name for p in tmp_path.iterdir()} >= {"bench.json", "bench.csv", "bench.md", "mlp.png"}
    machine = json.loads(path.read_text())["machine"]
    assert {"cpu", "isa", "threads", "torch", "date", "commit", "command"} <= set(machine)
    assert len((tmp_path / "bench.csv").read_text().splitlines()) == 1 + len(rows)
    assert "| 2.00x |" in (tmp_path / "bench.md").read_text()


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.05", 0.05), ("0", 0.0), ("12.5%", 0.125)])
def test_fail_over_is_a_share(text: str, share: float) -> None:
    assert regressions.parse_share(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["5", "-1%", "100%", "five", "", "nan", "%"])
def test_fail_over_refuses_what_is_no_share(text: str) -> None:
    with pytest.raises(ValueError, match="must be a share"):
        regressions.parse_share(text)


@pytest.mark.parametrize(
    ("after", "code"),
    [
        (row(speedup=2.0), 0),
        (row(speedup=1.95), 0),  # 2.6% slower
        (row(speedup=1.8), 1),  # 11% slower
        (row(speedup=2.0, seconds=10.0), 0),  # a slower machine: eager took ten times as long too
        (row(status="wrong: output 0", speedup=None), 1),
        (row(speedup=None), 0),  # measured without eager: nothing can be said
    ],
)
def test_compare_judges_the_ratio_to_eager(tmp_path: Path, capsys, after: engine.Row, code: int) -> None:
    a, b = saved(tmp_path / "a", [row(), row(provider=EAGER, speedup=1.0)]), saved(tmp_path / "b", [after])
    assert bench.run(["compare", str(a), str(b), "--fail-over", "5%"]) == code
    assert "mlp, case, bf16, both" in capsys.readouterr().out


def test_compare_only_looks_at_ours(tmp_path: Path) -> None:
    compiled = [[row(), row(provider=COMPILE, speedup=s)] for s in (2.0, 1.0)]
    a, b = (saved(tmp_path / name, rows) for name, rows in zip("ab", compiled, strict=True))
    assert bench.run(["compare", str(a), str(b)]) == 0


# ---- the command ----


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no_such_op"], "no_such_op"),
        (["mlp", "--dtype", "fp8"], "fp8"),
        (["mlp", "--providers", "jax"], "jax"),
        (["mlp", "--directions", "sideways"], "sideways"),
        (["mlp", "--filter", "no such case"], "--list"),
        (["mlp", "--threads", "0"], "--threads"),
        (["mlp", "--device", "tpu"], "--device"),
        (["mlp", "--providers", ","], "--providers"),
        (["--no-such-option"], "--no-such-option"),
        (["compare", "/nowhere/a.json", "/nowhere/b.json"], "/nowhere/a.json"),
        (["compare", __file__, __file__], "test_bench.py"),
        (["compare", "a.json"], "B.json"),
        (["compare", "a.json", "b.json", "--fail-over", "5"], "--fail-over"),
        (["mlp", "--out", f"{__file__}/folder"], "--out"),
    ],
)
def test_bad_input_is_answered_by_one_line(arguments: list[str], named: str, capsys) -> None:
    assert bench.run(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("bigmodel-fast bench: ")
    assert named in output.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_bad_input(capsys) -> None:
    assert bench.run(["mlp", "--device", "cuda"]) == 2
    assert "--device cuda" in capsys.readouterr().err


def test_list_runs_nothing(capsys, monkeypatch) -> None:
    monkeypatch.setattr(engine, "measure", None)
    assert bench.run(["attention", "--list", "--filter", "padded", "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out == "attention: full 32x12x128x64 padded (bf16; eager, bigmodel_fast)\n"


def test_the_command_measures_and_writes(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Cpu, "peaks", lambda self: PEAKS)
    arguments = ["rms_norm", "--filter", "1000x333", "--dtype", "fp32", "--no-memory", "--out", str(tmp_path / "out")]
    assert bench.run([*arguments, "--directions", "both"]) == 0
    output = capsys.readouterr().out
    assert "1000x333, fp32, both" in output
    rows = report.Report.load(tmp_path / "out" / "bench.json").rows
    assert [r.provider for r in rows] == [EAGER, OURS]
    assert (tmp_path / "out" / "rms_norm.png").stat().st_size > 0


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_):
        yield row()
        raise KeyboardInterrupt

    monkeypatch.setattr(Cpu, "peaks", lambda self: PEAKS)
    monkeypatch.setattr(engine, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run(["mlp", "--out", str(tmp_path)])
    assert len(report.Report.load(tmp_path / "bench.json").rows) == 1


def test_pytest_benchmark_collects_the_same_cases() -> None:
    pytest.importorskip("pytest_benchmark")
    file = Path(benchmarks.__file__).parent / "bench_rotary.py"
    command = [sys.executable, "-m", "pytest", str(file), "-k", "1x12/12x1x64 and fp32", "--benchmark-disable"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_what_a_save_costs_is_measured_in_turns(settings) -> None:
    seconds = saving.measured(settings(), blocks=4, steps=3)
    assert {saves: len(times) for saves, times in seconds.items()} == {False: 2, True: 2}
    steps = sorted(path.name for path in (settings().out_folder / "checkpoints").glob("step-*"))
    assert steps == ["step-00000009", "step-00000015"]  # kept of three saves, each at its block's beginning

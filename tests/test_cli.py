"""The command line: what it prints, what it refuses with one line, and a run from end to end."""

import io
import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bigmodel_fast.cli import COMMANDS, main

for package in ("jsonargparse", "yaml", "rich", "safetensors", "matplotlib", "tokenizers"):
    pytest.importorskip(package)

from rich.console import Console  # noqa: E402

from bigmodel_fast.cli.progress import Bar, describe_evaluation  # noqa: E402
from bigmodel_fast.train import TrainConfig, load_checkpoint, pretrain  # noqa: E402


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and a finished run on it."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "corpus").mkdir()
    for i in range(40):
        (folder / "corpus" / f"{i}.txt").write_text(f"{i}: naïve 😀 all work and no play makes a dull day\n" * 2)
    assert main(["pretrain", *tiny(folder), "--out", str(folder / "run"), "--steps", "30"]) == 0
    return folder


def tiny(folder: Path) -> list[str]:
    """Options of a run that takes a fraction of a second."""
    options = {
        "data": folder / "corpus",
        "cache": folder / "cache",
        "vocab_size": 270,
        "model.layers": 1,
        "model.heads": 2,
        "model.width": 32,
        "model.context": 16,
        "optim.batch": 4,
        "optim.warmup": 2,
    }
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 2) -> str:
    """Runs a command that must fail; returns the one line it may print on stderr."""
    assert main(argv) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert "Traceback" not in lines[0]
    return lines[0]


# ---- the commands ----


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, line in COMMANDS.items():
        assert name in text
        assert line in text
    assert main([]) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import bigmodel_fast

    assert main(["--version"]) == 0
    assert bigmodel_fast.__version__ in capsys.readouterr().out


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    for command, keys in (
        ("pretrain", ["data", "minutes", "resume", "model.layers", "optim.lr"]),
        ("generate", ["path", "prompt", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "samples"]),
        ("info", ["json"]),
    ):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        assert end.value.code == 0
        options = capsys.readouterr().out.partition("options:")[2].split("\n  --")[1:]
        explained = {o.split()[0]: " ".join(o.split()[2:]) for o in options}
        assert set(keys) <= explained.keys()
        for key, text in explained.items():
            assert len(text.partition("(type:")[0].split()) >= 2, (command, key, text)


def test_printed_config_makes_the_same_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import yaml

    with pytest.raises(SystemExit):
        main(["pretrain", "--model.layers", "3", "--optim.betas", "[0.8,0.9]", "--steps=7", "--print-config"])
    printed = capsys.readouterr().out
    config = TrainConfig.from_dict(yaml.safe_load(printed))
    assert (config.model.layers, config.optim.betas, config.steps) == (3, (0.8, 0.9), 7)
    (tmp_path / "c.yaml").write_text(printed)
    with pytest.raises(SystemExit):
        main(["pretrain", "--config", str(tmp_path / "c.yaml"), "--optim.lr", "0.5", "--print_config"])
    again = TrainConfig.from_dict(yaml.safe_load(capsys.readouterr().out))
    assert again.optim.lr == 0.5
    again.optim.lr = config.optim.lr
    assert again == config


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpu_isa"] in found["cpu_isas_supported"]
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    for measured in ("peak_gflops_fp32", "peak_gflops_bf16", "copy_gbytes_per_second"):
        assert found[measured] > 0
    assert main(["info"]) == 0
    assert found["cpu"] in capsys.readouterr().out


# ---- one line for what cannot work ----


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["--optim.lrr", "3"], ["optim.lrr", "no such key"]),
        (["--optim.lr", ".nan"], ["optim.lr", "finite", "nan"]),
        (["--optim.lr", "nan"], ["optim.lr", "nan"]),
        (["--optim.lr", "-1"], ["optim.lr", "more than 0"]),
        (["--optim.betas", "[0.9, 1.5]"], ["optim.betas", "1.5"]),
        (["--steps", "1.5"], ["steps", "expected int", "1.5"]),
        (["--steps", "0"], ["steps", "1 or more"]),
        (["--minutes", "0"], ["minutes", "more than 0"]),
        (["--vocab_size", "100"], ["vocab_size", "257"]),
        (["--model.layout", "bert"], ["model.layout", "gpt2", "modern", "bert"]),
        (["--model.width", "33"], ["model.width", "multiple of heads", "33"]),
        (["--data", "/nowhere/at/all"], ["--data", "no such file"]),
        (["--resume", "/nowhere/at/all"], ["/nowhere/at/all", "no checkpoint"]),
        (["--optim.batch", "100000"], ["100000", "less than one batch"]),
        (["--config", "/nowhere.yaml"], ["config", "/nowhere.yaml"]),
        (["surplus"], ["surplus"]),
    ],
)
def test_pretrain_names_what_is_wrong(
    options: list[str], names: list[str], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    line = refused(["pretrain", *tiny(place), "--out", str(out), *options], capsys)
    for name in names:
        assert name in line
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("optim: {lrr: 3}", "optim.lrr"),
        ("optim: {lr: .nan}", "optim.lr"),
        ("steps: [", "config"),
        ("model: 3", "model"),
        ("surplus: 1", "surplus"),
    ],
)
def test_a_config_file_is_checked_as_options_are(
    text: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert name in refused(["pretrain", "--config", str(tmp_path / "c.yaml")], capsys)


def test_an_empty_folder_and_a_folder_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    out = str(tmp_path / "run")
    assert "no text in it" in refused(["pretrain", "--data", str(tmp_path / "empty"), "--out", out], capsys)
    assert "out: cannot write" in refused(["pretrain", "--out", str(tmp_path / "file" / "run")], capsys)


def test_a_truncated_checkpoint(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["pretrain", *tiny(place), "--out", str(tmp_path / "run"), "--steps", "2"]
    assert main(options) == 0
    weights = tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    capsys.readouterr()
    assert "damaged (model.safetensors has 1000 bytes of" in refused([*options, "--resume", "auto"], capsys)
    assert "damaged (model.safetensors" in refused(["generate", "--path", str(tmp_path / "run")], capsys)


def test_a_failure_on_the_way_has_another_code(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path / "run"), "--optim.lr", "1e30", "--optim.warmup", "0", "--steps", "100"]
    line = refused(["pretrain", *tiny(place), *options], capsys, code=1)
    assert "no finite loss" in line
    assert "optim.lr" in line


@pytest.mark.parametrize("package", ["tokenizers", "safetensors", "tensorboard"])
def test_a_missing_package_is_named_with_its_extra(
    package: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    options = [*tiny(place), "--out", str(tmp_path / "run"), "--cache", str(tmp_path), "--tensorboard"]
    extra = "tensorboard" if package == "tensorboard" else "train"
    assert f"pip install 'bigmodel_fast[{extra}]'" in refused(["pretrain", *options], capsys)


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(argv: list[str]) -> int:
        raise KeyError("a bug")

    monkeypatch.setattr("bigmodel_fast.cli.info.run", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["info"])


def test_an_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'pretain'" in refused(["pretain"], capsys)


def test_ctrl_c_before_or_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("bigmodel_fast.cli.info.run", interrupted)
    assert main(["info"]) == 130


# ---- a run ----


def test_ctrl_c_saves_and_the_command_it_prints_goes_on(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "a run"
    options = [*tiny(place), "--out", str(out), "--steps", "1000000", "--log_every", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "bigmodel_fast", "pretrain", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("step     3 "):
                process.send_signal(signal.SIGINT)
                break
        rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert errors == ""
    stopped, to_go_on = rest.splitlines()[-2:]
    step = load_checkpoint(out).step
    assert stopped.startswith(f"stopped after step {step};")
    command = shlex.split(to_go_on.removeprefix("to go on: "))
    assert command[0] == "bigmodel-fast"
    assert main([*command[1:], "--steps", str(step + 2)]) == 0
    assert load_checkpoint(out).step == step + 2


def test_a_terminal_sees_a_bar_with_lines_above(place: Path, tmp_path: Path) -> None:
    screen = io.StringIO()
    bar = Bar(Console(file=screen, force_terminal=True, width=120, highlight=False))
    values = {"data": str(place / "corpus"), "out": str(tmp_path / "run"), "cache": str(tmp_path), "steps": 3}
    shape = {"layers": 1, "heads": 2, "width": 32, "context": 16}
    result = pretrain(TrainConfig.from_dict({**values, "model": shape, "vocab_size": 270, "optim": {"batch": 4}}), bar)
    shown = screen.getvalue()
    last = shown.rpartition("step 3")[2]
    for part in ("100%", "loss", "tokens/s", "GFLOP/s", "0:00 left"):
        assert part in last
    assert result.evaluation is not None
    assert describe_evaluation(result.evaluation) in shown
    assert "\x1b[?25h" in last  # the cursor is back


def test_generate_is_the_models_own_and_repeats_by_seed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def generated(*options: str) -> str:
        capsys.readouterr()
        argv = ["generate", "--path", str(place / "run"), "--prompt", "1: na", "--max-new-tokens", "60", *options]
        assert main([*argv, "--dtype", "fp32"]) == 0
        return capsys.readouterr().out

    first = generated("--seed", "1")
    assert first == generated("--seed", "1")
    assert first != generated("--seed", "2")
    assert generated("--seed", "1", "--samples", "2").count("1: na") >= 2

    checkpoint = load_checkpoint(place / "run")
    tokenizer = checkpoint.tokenizer()
    start = torch.tensor([tokenizer.encode("1: na")])
    whole = checkpoint.model().generate(start, 60, temperature=0.8, top_p=0.95, seed=1)[0].tolist()
    text = whole[: whole.index(tokenizer.end)] if tokenizer.end in whole else whole
    assert first == tokenizer.decode(text) + "\n"


def test_generate_prints_characters_that_tokens_cut(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    smile = [*"😀é".encode(), 0xF0]  # and a character that never ends

    def stream(self, *_):
        tokenizer = load_checkpoint(place / "run").tokenizer()
        by_bytes = {tokenizer.bytes_of([t]): t for t in range(tokenizer.vocab_size)}
        yield from (torch.tensor([[by_bytes[bytes([b])]]]) for b in smile)

    monkeypatch.setattr("bigmodel_fast.models.GPT.stream", stream)
    assert main(["generate", "--path", str(place / "run")]) == 0
    assert capsys.readouterr().out == "😀é\ufffd\n"


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--path", "/nowhere"], "/nowhere"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "2"], "top_p"),
        (["--top_k", "0"], "top_k"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--samples", "x"], "samples"),
    ],
)
def test_generate_names_what_is_wrong(options: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert name in refused(["generate", *options], capsys)

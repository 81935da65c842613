"""What bigmodel-fast finetune refuses: one line that names what is wrong, exit code 2, and nothing left behind."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tiny_models import PACKAGES, labelled_code, tiny_bert, tiny_gpt2, write_lines

for package in PACKAGES:
    pytest.importorskip(package)

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from bigmodel_fast.cli import main  # noqa: E402
from bigmodel_fast.train.finetune_config import FinetuneConfig  # noqa: E402
from bigmodel_fast.train.finetuning import Finetuner  # noqa: E402


@pytest.fixture(scope="module")
def snippets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    return labelled_code(tmp_path_factory.mktemp("snippets"))


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["finetune", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("bigmodel-fast finetune: ")
    return err


def test_bad_input_is_one_line(
    snippets: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, _ = snippets
    out = tmp_path / "run"
    good = ["--model", model, "--data", data, "--out", str(out)]
    assert "model must be given" in refused([], capsys)
    assert "there is no folder bert-base-uncased; give a local" in refused(["--model", "bert-base-uncased"], capsys)
    (tmp_path / "empty").mkdir()
    assert "holds neither config.json" in refused(["--model", str(tmp_path / "empty")], capsys)
    assert "data must be given for task qa" in refused(["--model", model, "--task", "qa"], capsys)
    assert "a bert has no head for task seq2seq" in refused(
        [*good, "--task", "seq2seq", "--columns.source", "text", "--columns.target", "label"], capsys
    )
    assert "no column for question among" in refused([*good, "--task", "qa"], capsys)
    assert "columns.label: no column stars; there are" in refused([*good, "--columns.label", "stars"], capsys)
    assert "optim.batch must be 1 or more, got 0" in refused([*good, "--optim.batch", "0"], capsys)
    assert "optim.lr must be more than 0, got -1" in refused([*good, "--optim.lr", "-1"], capsys)
    assert "max_length must be 64 or less for this model, got 65" in refused([*good, "--max-length", "65"], capsys)
    assert "no such key" in refused([*good, "--learning-rate", "1"], capsys)
    assert "columns.rows" in refused([*good, "--columns.rows", "1"], capsys)
    other = write_lines(tmp_path / "other.jsonl", [{"text": "a", "label": "asyncio"}, {"text": "b", "label": "zoo"}])
    said = refused([*good, "--validation", other], capsys)
    assert f"{other}:2: column label: unknown label zoo; the model's are asyncio, ctypes" in said
    alone = write_lines(tmp_path / "alone.jsonl", [{"text": "a", "label": "x"}] * 20)
    assert "all labels are x" in refused([*good[:3], alone, "--out", str(out)], capsys)
    few = write_lines(tmp_path / "few.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    assert "2 examples are too few to hold out 10%" in refused([*good[:3], few, "--out", str(out)], capsys)
    assert not out.exists()


BROKEN = {
    "tags": ("tokens", {"tokens": ["a", "b"], "tags": ["O"]}, "column tags: 1 tags for 2 words"),
    "answer": ("qa", {"question": "a", "context": "b c", "answers": "d"}, "the answer does not stand in the context"),
    "place": (
        "qa",
        {"question": "a", "context": "b c", "answers": {"text": ["c"], "answer_start": [0]}},
        "the answer does not stand at character 0 of the context",
    ),
    "question": ("qa", {"question": "a " * 80, "context": "b c", "answers": "b"}, "column question: too long for"),
    "neither": ("causal", {"prompt": "a"}, "column text: there is none, nor prompt and completion"),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_examples_that_cannot_be_are_named(
    case: tuple[str, dict[str, Any], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task, row, message = case
    make = tiny_gpt2 if task == "causal" else tiny_bert
    model = make(tmp_path / "model", ["a b c d"])
    data = write_lines(tmp_path / "bad.jsonl", [row] * 2)
    said = refused(
        ["--model", model, "--data", data, "--validation", data, "--task", task, "--out", str(tmp_path / "x")], capsys
    )
    assert f"{data}:1: " in said
    assert message in said


def test_weights_that_are_pickles_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = Path(tiny_bert(tmp_path / "model", ["a b"]))
    data = write_lines(tmp_path / "data.jsonl", [{"text": "a", "label": "xy"[i % 2]} for i in range(20)])
    argv = ["--model", str(model), "--data", data, "--out", str(tmp_path / "x")]
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    assert "has no weights as safetensors" in refused(argv, capsys)
    (model / "model.safetensors").write_bytes(b"nonsense")
    assert "cannot be read" in refused(argv, capsys)


def test_a_missing_package_is_named(
    snippets: tuple[str, str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "peft" else found(name, *a))
    said = refused(["--model", snippets[0], "--train", "lora"], capsys)
    assert "needs the package peft: pip install 'bigmodel_fast[finetune]'" in said


def test_the_network_is_never_asked(
    snippets: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    config = FinetuneConfig(model=snippets[0], data=snippets[1], out=str(tmp_path / "run"), max_length=16)
    Finetuner(config).close()

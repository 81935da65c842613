"""What cannot work is refused by every command: exit code 2, one line that names the key, nothing written."""

import json
from pathlib import Path

import pytest
import torch

from bigmodel_fast.cli import COMMANDS, main

for package in ("jsonargparse", "yaml", "rich", "matplotlib", "safetensors", "tokenizers"):
    pytest.importorskip(package)

# A command line after its command, or a YAML file (a text), and the key that the line has to name.
WRONG: dict[str, list[tuple[list[str] | str, str]]] = {
    "pretrain": [
        (["--optim.lrr", "3"], "optim.lrr"),
        (["--lr", "3"], "lr"),
        (["--optim.lr", "nan"], "optim.lr"),
        (["--optim.lr", "-1"], "optim.lr"),
        (["--optim.lr", "fast"], "optim.lr"),
        (["--optim.betas", "[0.9]"], "optim.betas"),
        (["--optim.betas", "[0.9,2]"], "optim.betas"),
        (["--optim.batch", "0"], "optim.batch"),
        (["--optim.accumulation", "-1"], "optim.accumulation"),
        (["--optim.floor", "1.5"], "optim.floor"),
        (["--optim.warmup", "-3"], "optim.warmup"),
        (["--model.layers", "0"], "model.layers"),
        (["--model.heads", "5"], "model.width"),
        (["--model.layout", "bert"], "model.layout"),
        (["--model.kv_heads", "2"], "model.heads"),
        (["--model.width", "1e3"], "model.width"),
        (["--steps", "0"], "steps"),
        (["--steps", "ten"], "steps"),
        (["--steps"], "steps"),
        (["--minutes", "inf"], "minutes"),
        (["--vocab_size", "100"], "vocab_size"),
        (["--device", "tpu"], "device"),
        (["--dtype", "int8"], "dtype"),
        (["--cuda-graphs", "--device", "cpu"], "cuda_graphs"),
        (["--data", "/nowhere/at/all"], "--data"),
        (["--resume", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--resume", ""], "resume"),
        (["--out", "/proc/run"], "out"),
        (["--config", "/nowhere.yaml"], "config"),
        (["--config"], "config"),
        (["--compile", "perhaps"], "compile"),
        (["--recompute", "perhaps"], "recompute"),
        (["--tokenizer", "words"], "tokenizer"),
        (["--keep", "0"], "keep"),
        (["--seed", "1.5"], "seed"),
        (["--model.mlp_width", "0"], "model.mlp_width"),
        (["--data", ""], "--data"),
        (["--threads", "-2"], "threads"),
        ("optim: {lr: fast}", "optim.lr"),
        ("model: 3", "model"),
        ("layers: 3", "layers"),
        ("steps: [", "config"),
        ("- steps", "config"),
        ("optim: {lr: !!python/name:os.system ''}", "config"),
    ],
    "train-image": [
        (["--epochs", "0"], "epochs"),
        (["--batch", "-1"], "batch"),
        (["--lr", "0"], "lr"),
        (["--lr", "nan"], "lr"),
        (["--warmup", "1"], "warmup"),
        (["--model", "resnet"], "model"),
        (["--model", "torchvision/resnet0"], "resnet0"),
        (["--model", "vit", "--vit.heads", "5"], "width"),
        (["--model", "vit", "--vit.patch", "3"], "patch"),
        (["--mlp.hidden", "[0]"], "mlp.hidden"),
        (["--mlp.hidden", "wide"], "mlp.hidden"),
        (["--mlp.activation", "sine"], "mlp.activation"),
        (["--mlp.dropout", "1.5"], "dropout"),
        (["--augment.shift", "-1"], "augment.shift"),
        (["--augment.fade", "-1"], "augment.fade"),
        (["--dtype", "fp8"], "dtype"),
        (["--resume", "maybe"], "resume"),
        (["--data", "/nowhere/at/all"], "data"),
        (["--seed", "-1"], "seed"),
        (["--size", "0"], "size"),
        (["--out", "/proc/run"], "out"),
        (["--vit.layers", "0", "--model", "vit"], "layers"),
        (["--vit.width", "0", "--model", "vit"], "width"),
        (["--model", ""], "model"),
        (["--lr"], "lr"),
        ("mlp: {hiden: [3]}", "mlp.hiden"),
        ("clip: loose", "clip"),
    ],
    "generate": [
        (["--path", "/nowhere"], "/nowhere"),
        (["--temperature", "-1"], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-p", "2"], "top_p"),
        (["--top-k", "0"], "top_k"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--samples", "x"], "samples"),
        (["--seed", "-5"], "seed"),
        (["--threads", "0"], "threads"),
        (["--promt", "hello"], "promt"),
        (["--prompt"], "prompt"),
        (["--device", "cuda"], "device"),
        ("seed: early", "seed"),
    ],
    "bench": [
        (["atention"], "atention"),
        (["--dtype", "fp64"], "--dtype"),
        (["--providers", "nobody"], "--providers"),
        (["--directions", "sideways"], "--directions"),
        (["--threads", "0"], "--threads"),
        (["--device", "tpu"], "--device"),
        (["attention", "--filter", "no such case"], "case"),
        (["--fast"], "--fast"),
        (["--out", "/proc/bench"], "--out"),
        (["attention", "--dtype"], "--dtype"),
        (["compare", "/nowhere.json", "/nowhere.json"], "/nowhere.json"),
        (["compare", "/nowhere.json"], "B.json"),
        (["compare", "a", "b", "--fail-over", "lots"], "--fail-over"),
        (["plan", "--threads", "none"], "--threads"),
    ],
    "info": [
        (["--jsn"], "jsn"),
        (["--json", "2"], "json"),
        (["surplus"], "surplus"),
    ],
    "plan": [
        (["--size", "big"], "size"),
        (["--size", "3"], "size"),
        (["--size", "99T"], "size"),
        (["--size", "7B", "--hf", "here"], "hf"),
        (["--hf", "/nowhere"], "hf"),
        (["--tokens", "-3"], "tokens"),
        (["--tokens", "1M", "--hours", "3"], "hours"),
        (["--hours", "0"], "hours"),
        (["--budget", "nan"], "budget"),
        (["--budget", "10"], "budget"),
        (["--price", "-1"], "price"),
        (["--gpus", "0"], "gpus"),
        (["--gpus", "4096", "--hardware", "h100"], "gpus"),
        (["--gpus", "7", "--size", "7B", "--hardware", "h100"], "gpus"),
        (["--gpus", "2"], "gpus"),
        (["--hardware", "abacus"], "hardware"),
        (["--data", "/nowhere/at/all"], "--data"),
        (["--model.heads", "5"], "model.width"),
        (["--chart", "/nowhere/plan.png", "--size", "7B", "--hardware", "h100"], "chart"),
        (["--objective", "mlm"], "objective"),
        (["--threads", "0"], "threads"),
        (["--optim.batch", "0"], "optim.batch"),
        (["--vocab_size", "1"], "vocab_size"),
        (["--hf", ".", "--hardware", "h100"], "hf"),
        (["--hardware", ""], "hardware"),
        ("gpus: many", "gpus"),
        ("hardware: [h100]", "hardware"),
    ],
}
CASES = [(command, given, key) for command, cases in WRONG.items() for given, key in cases]


def test_there_are_enough_of_every_command() -> None:
    assert len(CASES) >= 60
    assert set(WRONG) <= set(COMMANDS)


@pytest.mark.parametrize(("command", "given", "key"), CASES, ids=[f"{c} {g}" for c, g, _ in CASES])
def test_refused_with_a_line(
    command: str,
    given: list[str] | str,
    key: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if command == "train-image":
        pytest.importorskip("sklearn")
        if "torchvision" in str(given):
            pytest.importorskip("torchvision")
    if "cuda" in given and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    argv = given
    if isinstance(given, str):
        (tmp_path / "given.yaml").write_text(given)
        argv = ["--config", "given.yaml"]
    before = sorted(tmp_path.rglob("*"))
    assert main([command, *argv]) == 2
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert len(lines) == 1, lines
    assert key in lines[0]
    assert lines[0].startswith(f"bigmodel-fast {command}")
    assert "Traceback" not in lines[0]
    assert len(lines[0]) < 400, lines[0]
    assert shown.out == ""
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ("{", "no JSON"),
        ([1], "no config"),
        ({"vocab_size": 100}, "hidden_size"),
        ({"vocab_size": "many", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}, "vocab_size"),
        ({"vocab_size": 0, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}, "vocab_size"),
        ({"vocab_size": True, "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}, "vocab_size"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
    ids=str,
)
def test_plan_refuses_a_broken_hugging_face_config(
    config: object, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    assert main(["plan", "--hf", str(tmp_path), "--hardware", "h100"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bigmodel-fast plan: hf: ")
    assert key in line

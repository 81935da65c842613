"""Objectives mlm and seq2seq: what they learn, how they go on, what they refuse, and what comes out of their models."""

import io
import json
import math
from pathlib import Path

import pytest
import torch
from test_train import Act, fail, terminate, without_times
from torch.utils.checkpoint import checkpoint

pytest.importorskip("safetensors")
pytest.importorskip("matplotlib")
pytest.importorskip("jsonargparse")
pytest.importorskip("rich")
pytest.importorskip("tokenizers")

from bigmodel_fast.cli import main
from bigmodel_fast.data import DataError
from bigmodel_fast.models import BERT, GPT, Transformer, layers, pack, translate
from bigmodel_fast.train import ConfigError, TrainConfig, Trainer, load_checkpoint, pretrain, read_metrics

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Digits, and their names the other way round: 12 is two one."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    numbers = [str(i) for i in range(10, 1000) if i % 9]
    for split, some in (("train", numbers[::2]), ("val", numbers[1::9])):
        (folder / f"{split}.num").write_text("\n".join(" ".join(n) for n in some) + "\n")
        words = (" ".join(NUMBERS[int(d)] for d in n[::-1]) for n in some)
        (folder / f"{split}.word").write_text("\n".join(words) + "\n")
    return folder


@pytest.fixture
def config(settings, pairs: Path):
    """Makes the config of a tiny run of an objective."""

    def make(objective: str, out: str = "run", **given) -> TrainConfig:
        if objective != "seq2seq":
            return settings(out, objective=objective, **given)
        languages = {"languages": "num-word", **given.pop("seq2seq", {})}
        optim = {"batch": 16, **given.pop("optim", {})}
        return settings(out, optim, objective="seq2seq", data=str(pairs), seq2seq=languages, **given)

    return make


# ---- learning ----


def test_a_bert_learns_to_fill_in(config) -> None:
    seen = Act(0, fail)
    result = pretrain(config("mlm", steps=60, eval_every=20, optim={"batch": 16, "warmup": 2, "lr": 1e-2}), seen)
    losses = [e.loss for e in seen.evaluations]
    assert losses[0] < math.log(258) - 1
    assert losses[2] < losses[0]
    model = load_checkpoint(result.checkpoint).model()
    assert isinstance(model, BERT)
    assert model.config.vocab_size == 258
    assert not model.training


def test_a_transformer_learns_to_translate(config) -> None:
    seen = Act(0, fail)
    shape = {"layers": 1, "heads": 2, "width": 64, "context": 32, "norm": "pre", "dropout": 0.0}
    optim = {"batch": 32, "warmup": 10, "lr": 5e-3}
    given = config("seq2seq", steps=120, eval_every=60, optim=optim, model=shape, tokenizer="bpe", vocab_size=300)
    pretrain(given, seen)
    first, last = (e.loss for e in seen.evaluations)
    assert last < first < 0.3 * math.log(300)
    assert isinstance(load_checkpoint(given.out_folder).model(), Transformer)


def test_evaluation_is_without_dropout_and_smoothing(config) -> None:
    trainer = Trainer(config("seq2seq", steps=2, eval_sequences=20, dtype="fp32"))
    trainer.run()
    assert trainer.model.training
    objective, model = trainer.objective, trainer.model.eval()
    total = count = 0
    for source, source_starts, target, target_starts, labels, _ in objective.validation():
        logits = model(source, source_starts, target, target_starts)
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    assert trainer.evaluation.loss == pytest.approx(total / count, rel=1e-5)
    smooth = objective.loss(model, *objective.validation()[0]).item()
    with torch.no_grad():
        assert objective.loss(model, *objective.validation()[0]).item() != pytest.approx(smooth, rel=1e-3)


# ---- going on ----


@pytest.mark.parametrize("objective", ["mlm", "seq2seq"])
def test_a_resumed_run_is_the_run_that_never_stopped_to_the_bit(objective: str, config) -> None:
    options = {"optim": {"batch": 8, "accumulation": 3, "warmup": 2, "lr": 1e-2}, "eval_every": 3, "steps": 26}
    if objective == "mlm":
        options |= {"mlm": {"whole_words": True}, "steps": 8}
    straight = config(objective, "straight", **options)
    pretrain(straight)
    stopped = config(objective, "stopped", resume="auto", **options)
    assert pretrain(stopped, Act(5, terminate)).step == 5
    torch.manual_seed(99)  # a new process has other random numbers
    pretrain(stopped)
    one, other = (load_checkpoint(c.out_folder) for c in (straight, stopped))
    for name in ("model.safetensors", "optimizer.safetensors", "tokenizer.json"):
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes(), name
    assert one.state["batches"]["epoch"] > 0
    lines = [without_times(read_metrics(c.out_folder / "metrics.jsonl")) for c in (straight, stopped)]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("objective", ["clm", "mlm", "seq2seq"])
def test_layers_may_be_recomputed_from_any_step_on(objective: str, config, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = config(objective, "straight", steps=4)
    pretrain(straight)
    pretrain(config(objective, "stopped", steps=4), Act(2, terminate))
    again = []
    monkeypatch.setattr(layers, "checkpoint", lambda f, *args, **how: again.append(f) or checkpoint(f, *args, **how))
    resumed = config(objective, "stopped", steps=4, resume="auto", recompute=True)
    pretrain(resumed)
    assert len(again) == 2 * (2 if objective == "seq2seq" else 1)  # of two steps; an encoder's layer and a decoder's
    one, other = (load_checkpoint(c.out_folder).path / "model.safetensors" for c in (straight, resumed))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("objective", ["mlm", "seq2seq"])
def test_a_step_may_be_cut_into_other_passes(objective: str, config) -> None:
    seen = Act(0, fail), Act(0, fail)
    model = {"layers": 1, "heads": 2, "width": 32, "context": 16, "dropout": 0.0}
    for act, optim in zip(seen, ({"batch": 8}, {"batch": 2, "accumulation": 4}), strict=True):
        pretrain(config(objective, str(optim["batch"]), steps=3, model=model, optim={"lr": 1e-2, **optim}), act)
    for one, other in zip(*(act.steps for act in seen), strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-2)


def test_checkpoints_from_before_there_were_objectives_are_of_clm(settings) -> None:
    path = pretrain(settings(steps=2)).checkpoint
    state = json.loads((path / "state.json").read_text())
    assert state.pop("objective") == "clm"
    for key in ("objective", "mlm", "seq2seq"):
        del state["config"][key]
    for key in ("norm", "dropout"):
        del state["config"]["model"][key]
    (path / "state.json").write_text(json.dumps(state))
    assert isinstance(load_checkpoint(path).model(), GPT)
    assert pretrain(settings(steps=3, resume="auto")).steps_done == 1


# ---- refusing ----


@pytest.mark.parametrize(
    ("objective", "given", "message"),
    [
        ("mlm", {"model": {"layout": "gpt2"}}, r"model\.layout is for objective clm, and the objective is mlm"),
        ("mlm", {"mlm": {"share": 1.0}}, r"mlm\.share must lie between 0 and 1, got 1\.0"),
        ("mlm", {"model": {"context": 1}}, r"model\.context must be 2 or more"),
        ("mlm", {"model": {"dropout": 1.5}}, r"model\.dropout must lie in \[0, 1\), got 1\.5"),
        ("seq2seq", {"mlm": {"whole_words": True}}, r"mlm\.whole_words is for objective mlm"),
        ("seq2seq", {"compile": True}, r"compile is for objective clm or mlm, and the objective is seq2seq"),
        ("seq2seq", {"seq2seq": {"label_smoothing": 1.0}}, r"seq2seq\.label_smoothing must lie in"),
        ("seq2seq", {"model": {"width": 33, "heads": 3}}, r"model\.width must be even .* got 33"),
    ],
)
def test_settings_that_cannot_work_are_named(objective: str, given: dict, message: str, config) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(config(objective, **given))


def test_pairs_that_are_not_there_are_named(config) -> None:
    with pytest.raises(DataError, match=r"seq2seq\.languages must say from what to what, such as num-word; none"):
        Trainer(config("seq2seq", seq2seq={"languages": None}))
    nowhere = config("seq2seq")
    nowhere.data = None
    with pytest.raises(DataError, match="data: objective seq2seq needs a folder"):
        Trainer(nowhere)


# ---- what comes out ----


def test_a_checkpoint_of_mlm_is_hugging_faces_bert(config) -> None:
    transformers = pytest.importorskip("transformers")
    model = load_checkpoint(pretrain(config("mlm", steps=3)).checkpoint).model()
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**model.hf_config())).eval()
    theirs.load_state_dict(model.hf_state_dict())
    tokens = torch.randint(258, (2, 16))
    torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_generate_fills_in_masks(config, capsys: pytest.CaptureFixture[str]) -> None:
    given = config("mlm", steps=20)
    model = load_checkpoint(pretrain(given).checkpoint).model()
    argv = ["generate", "--path", given.out, "--dtype", "fp32", "--top-k", "3"]
    capsys.readouterr()
    assert main([*argv, "--prompt", "all w[MASK]rk [MASK]nd"]) == 0
    text, *masks = capsys.readouterr().out.splitlines()
    tokens = [256, *b"all w", 257, *b"rk", 257, *b"nd"]  # the space before a mask is the mask's
    logits = model(torch.tensor([tokens]))[0, :, :257]
    likely = [logits[i].softmax(-1).topk(3) for i in (6, 9)]
    tokens[6], tokens[9] = (int(found.indices[0]) for found in likely)
    assert text == bytes(tokens[1:]).decode(errors="replace")
    for line, found in zip(masks, likely, strict=True):
        rows = zip(found.values.tolist(), found.indices.tolist(), strict=True)
        shown = (f"{bytes([token]).decode(errors='replace')!r} {p:.1%}" for p, token in rows)
        assert line.partition(": ")[2] == ", ".join(shown)
    assert main([*argv, "--prompt", "nothing to do"]) == 2
    assert "prompt: must have a [MASK]" in capsys.readouterr().err
    assert main([*argv, "--prompt", "x" * 16 + "[MASK]"]) == 2
    assert "more than the context of 16" in capsys.readouterr().err
    assert main([*argv, "--input", "-"]) == 2
    assert "input: is for models of objective seq2seq" in capsys.readouterr().err


def test_generate_translates_lines(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = config("seq2seq", steps=3)
    path = pretrain(given).checkpoint
    lines = ["1 2", "", "4 5 6"]
    (tmp_path / "lines").write_text("\n".join(lines) + "\n")
    argv = ["generate", "--path", given.out, "--dtype", "fp32", "--max-new-tokens", "5"]

    def printed(*options: str) -> list[str]:
        capsys.readouterr()
        assert main([*argv, *options]) == 0
        return capsys.readouterr().out.split("\n")[:-1]

    found = printed("--input", str(tmp_path / "lines"))
    assert len(found) == 3
    assert found[1] == ""
    monkeypatch.setattr("sys.stdin", io.StringIO("1 2\n\n4 5 6"))
    assert printed() == found
    assert printed("--prompt", "4 5 6") == found[2:]
    checkpoint = load_checkpoint(path)
    tokenizer = checkpoint.tokenizer()
    packed = pack([[*tokenizer.encode(lines[0]), tokenizer.end]])
    (expected,) = translate(checkpoint.model(), *packed, end=tokenizer.end, max_new_tokens=5)
    assert found[0] == tokenizer.decode(expected.tokens)
    for options, words in (
        (["--prompt", "1 " * 20], "line 1: has 40 tokens, more than the context of 16"),
        (["--input", "/nowhere"], "input: /nowhere"),
        (["--beams", "0"], "beams must be 1 or more"),
        (["--length-penalty", "-1"], "length_penalty must be 0 or more"),
    ):
        assert main([*argv, *options]) == 2
        assert words in capsys.readouterr().err

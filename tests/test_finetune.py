"""bigmodel-fast finetune: each task learns something real from random weights, and runs resume with the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import (
    PACKAGES,
    labelled_code,
    phrases,
    questions,
    sources,
    tagged_code,
    tiny_bart,
    tiny_bert,
    tiny_gpt2,
    write_lines,
)

for package in PACKAGES:
    pytest.importorskip(package)

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from bigmodel_fast.cli import main  # noqa: E402
from bigmodel_fast.train import ConfigError, Reporter, TrainError  # noqa: E402
from bigmodel_fast.train.finetune_config import FinetuneConfig  # noqa: E402
from bigmodel_fast.train.finetuning import Finetuner, finetune  # noqa: E402

FAST = {"lr": 1e-2, "batch": 16, "schedule": "cosine"}


def config(model: str, data: str | None, out: Path, optim: dict[str, Any] | None = None, **how: Any) -> FinetuneConfig:
    optim = {**FAST, **(optim or {})}
    return FinetuneConfig.from_dict({"model": model, "data": data, "out": str(out), "optim": optim, **how})


@pytest.fixture(scope="module")
def snippets(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """A tiny BERT, and files of labelled snippets of the standard library to train and to validate on."""
    return labelled_code(tmp_path_factory.mktemp("snippets"))


def test_snippets_are_told_apart_and_saved_for_transformers(
    snippets: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, train, validation = snippets
    out = tmp_path / "run"
    argv = ["--model", model, "--data", train, "--validation", validation, "--out", str(out), "--max-length", "64"]
    argv += ["--steps", "90", "--eval-every", "45", "--optim.lr", "3e-3", "--optim.batch", "16", "--from-scratch"]
    assert main(["finetune", *argv]) == 0
    said = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    largest = max(map(sum, report["confusion"])) / report["examples"]["validation"]
    assert report["metrics"]["accuracy"] > 1.6 * largest  # of ten classes, from random weights in 90 steps
    assert report["metrics"].keys() == {"accuracy", "precision", "recall", "f1", "mcc"}
    assert sum(map(sum, report["confusion"])) == report["examples"]["validation"]
    assert "new weights: classifier.bias, classifier.weight" in said
    assert "BertSelfAttention" in said  # the report of accelerate
    assert report["from_scratch"]["steps"] == report["steps"]
    assert report["from_scratch"]["metrics"].keys() == report["metrics"].keys()
    assert "fine-tuned   from random weights" in said
    for picture in ("curves.png", "confusion.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    measured = [line for line in map(json.loads, (out / "metrics.jsonl").open()) if "validation_loss" in line]
    assert max(line["accuracy"] for line in measured) == pytest.approx(report["metrics"]["accuracy"])
    assert next(m for m in measured if m["accuracy"] == report["metrics"]["accuracy"])["step"] == report["best_step"]

    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    judged = AutoModelForSequenceClassification.from_pretrained(out / "model", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(out / "model", local_files_only=True)
    rows = [json.loads(line) for line in Path(validation).read_text().splitlines()]
    batch = tokenizer([r["text"] for r in rows], truncation=True, max_length=64, padding=True, return_tensors="pt")
    with torch.no_grad():
        best = judged(**batch).logits.argmax(1).tolist()
    right = sum(judged.config.id2label[i] == row["label"] for i, row in zip(best, rows, strict=True)) / len(rows)
    assert right == pytest.approx(report["metrics"]["accuracy"], abs=0.02)  # bf16 there, float32 here


def test_keywords_are_found_in_code(tmp_path: Path) -> None:
    rows = tagged_code(25)
    model = tiny_bert(tmp_path / "bert", (" ".join(r["tokens"]) for r in rows))
    data = write_lines(tmp_path / "code.jsonl", rows)
    result = finetune(config(model, data, tmp_path / "run", task="tokens", steps=120))
    assert result.report is not None
    metrics = result.report["metrics"]
    assert metrics["f1"] > 0.8
    assert metrics["accuracy"] > 0.9
    assert {kind["name"] for kind in result.report["entities"]} >= {"BRANCH", "DEFINITION", "LOOP"}


def test_numbers_answer_questions_in_windows_too(tmp_path: Path) -> None:
    rows = questions(300)
    model = tiny_bert(tmp_path / "bert", [r["context"] for r in rows] + [rows[0]["question"]])
    data = write_lines(tmp_path / "qa.jsonl", rows)
    how: dict[str, Any] = {"task": "qa", "max_length": 40, "stride": 10, "steps": 120}
    tuner = Finetuner(config(model, data, tmp_path / "run", **how))
    assert len(tuner.features) > len(tuner.examples)  # windows
    report = tuner.run().report
    assert report is not None
    assert report["metrics"]["exact_match"] > 0.8
    assert report["metrics"]["f1"] >= report["metrics"]["exact_match"]


def test_code_is_continued(tmp_path: Path) -> None:
    texts = sources(12)
    model = tiny_gpt2(tmp_path / "gpt2", texts)
    data = write_lines(tmp_path / "code.jsonl", [{"text": t} for t in texts])
    report = finetune(config(model, data, tmp_path / "run", task="causal", max_length=64, steps=80)).report
    assert report is not None
    assert report["metrics"]["perplexity"] < 500  # of 1500 words, in files it has not seen
    assert report["metrics"]["token_accuracy"] > 0.05


def test_completions_alone_count(tmp_path: Path) -> None:
    rows = [{"prompt": r["source"], "completion": r["target"]} for r in phrases(120)]
    model = tiny_gpt2(tmp_path / "gpt2", [f"{r['prompt']} {r['completion']}" for r in rows])
    data = write_lines(tmp_path / "pairs.jsonl", rows)
    tuner = Finetuner(config(model, data, tmp_path / "run", task="causal", steps=100))
    first = tuner.features[0].inputs
    assert [label == -100 for label in first["labels"]] == [True] * 4 + [False] * 5  # the end of text is one
    assert tuner.task.targets(tuner.task.collate(tuner.features[:3])) == 3 * 5
    report = tuner.run().report
    assert report is not None
    assert report["metrics"]["token_accuracy"] > 0.95  # the prompt says it all


def test_phrases_are_translated(tmp_path: Path) -> None:
    pytest.importorskip("sacrebleu")
    rows = phrases(300)
    model = tiny_bart(tmp_path / "bart", [f"{r['source']} {r['target']}" for r in rows])
    data = tmp_path / "phrases.tsv"
    data.write_text("source\ttarget\n" + "".join(f"{r['source']}\t{r['target']}\n" for r in rows), encoding="utf-8")
    how: dict[str, Any] = {"task": "seq2seq", "steps": 90, "max_new_tokens": 10}
    report = finetune(config(model, str(data), tmp_path / "run", {"lr": 5e-3}, **how)).report
    assert report is not None
    assert report["metrics"]["bleu"] > 60  # a wrong number in each phrase gives 0
    assert "tok:13a" in report["bleu_signature"]


# ---- what is trained ----


@pytest.mark.parametrize("train", ["lora", "frozen"])
def test_parts_are_trained(train: str, snippets: tuple[str, str, str], tmp_path: Path) -> None:
    if train == "lora":
        pytest.importorskip("peft")
    model, data, validation = snippets
    how: dict[str, Any] = {"train": train, "validation": validation, "max_length": 32, "steps": 25}
    tuner = Finetuner(config(model, data, tmp_path / "run", **how))
    trained = {name for name, p in tuner.model.named_parameters() if p.requires_grad}
    assert all("classifier" in name or "lora_" in name for name in trained)
    assert any("classifier" in name for name in trained)
    result = tuner.run()
    assert result.report is not None
    before, after = load_file(f"{model}/model.safetensors"), load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {f"bert.{name}" for name in before} == {name for name in after if not name.startswith("classifier")}
    changed = [name for name in before if not torch.equal(before[name], after[f"bert.{name}"])]
    assert bool(changed) == (train == "lora")
    assert all(name.endswith("weight") and "norm" not in name.lower() for name in changed)


def test_learning_rates_fall_from_layer_to_layer(snippets: tuple[str, str, str], tmp_path: Path) -> None:
    model, data, _ = snippets
    optim = {"layer_decay": 0.5, "lr": 0.08, "weight_decay": 0.3}
    tuner = Finetuner(config(model, data, tmp_path / "run", optim))
    names = {p: name for name, p in tuner.model.named_parameters()}
    rates = {names[p]: group for group in tuner.optimizer.param_groups for p in group["params"]}
    assert rates["classifier.weight"]["base_lr"] == rates["bert.pooler.dense.bias"]["base_lr"] == pytest.approx(0.08)
    assert rates["bert.encoder.layer.1.output.dense.weight"]["base_lr"] == pytest.approx(0.04)
    assert rates["bert.encoder.layer.0.output.dense.weight"]["base_lr"] == pytest.approx(0.02)
    assert rates["bert.embeddings.word_embeddings.weight"]["base_lr"] == pytest.approx(0.01)
    assert rates["bert.embeddings.LayerNorm.weight"]["base_lr"] == pytest.approx(0.01)
    decays = {name: group["weight_decay"] for name, group in rates.items()}
    assert decays["classifier.weight"] == 0.3
    assert decays["classifier.bias"] == decays["bert.encoder.layer.0.output.LayerNorm.weight"] == 0
    tuner.train_step()
    factor = 1 / (0.06 * tuner.steps)  # of the first step of the warm-up
    for group in tuner.optimizer.param_groups:
        assert group["lr"] == pytest.approx(group["base_lr"] * factor)


def test_accelerated_and_stock_runs_agree(snippets: tuple[str, str, str], tmp_path: Path) -> None:
    model, data, _ = snippets
    losses = []
    for accelerate in (True, False):
        out = tmp_path / str(accelerate)
        optim = {"batch": 8, "accumulation": 2} if accelerate else {}  # the same step in two passes
        tuner = Finetuner(config(model, data, out, optim, accelerate=accelerate, dtype="fp32"))
        for module in tuner.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        tuner.model.config.attention_probs_dropout_prob = 0.0
        for layer in tuner.model.bert.encoder.layer:
            layer.attention.self.dropout.p = 0.0
        losses.append([tuner.train_step() for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)


def test_rare_classes_weigh_more(snippets: tuple[str, str, str], tmp_path: Path) -> None:
    model, data, _ = snippets
    balanced = Finetuner(config(model, data, tmp_path / "a", class_weights="balanced"))
    labels = balanced.task.labels
    weights = balanced.task._weights
    rarest = min(range(len(labels)), key=labels.counts.__getitem__)
    assert weights.argmax() == rarest
    assert (weights * torch.tensor(labels.counts)).sum() == pytest.approx(sum(labels.counts))
    with pytest.raises(ConfigError, match=r"class_weights: 2 numbers for \d+ classes"):
        Finetuner(config(model, data, tmp_path / "b", class_weights=[1.0, 2.0]))


# ---- stopping and going on ----


class StopAfter(Reporter):
    """Asks the run to stop, as Ctrl-C does, once it has taken so many steps."""

    def __init__(self, steps: int):
        self.steps = steps

    def step(self, step: Any) -> None:
        if step.step == self.steps:
            import signal

            signal.raise_signal(signal.SIGINT)


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(
    snippets: tuple[str, str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data, _ = snippets
    how: dict[str, Any] = {"steps": 8, "eval_every": 3, "max_length": 24, "train": "full"}
    assert finetune(config(model, data, tmp_path / "whole", **how)).finished
    stopped = finetune(config(model, data, tmp_path / "halved", **how), StopAfter(5))
    assert (stopped.finished, stopped.step, stopped.report) == (False, 5, None)
    again = ["finetune", "--config", str(tmp_path / "halved" / "config.yaml")]
    assert main(again) == 2
    assert "holds a run already; go on with --resume auto" in capsys.readouterr().err
    assert main([*again, "--resume", "auto", "--seed", "3"]) == 2
    assert "of another run (seed is 0 there and 3 here)" in capsys.readouterr().err
    assert main([*again, "--resume", "auto"]) == 0
    assert "resumed after step 5" in capsys.readouterr().out
    whole, halved = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "halved"))
    assert all(torch.equal(whole[name], halved[name]) for name in whole)
    logs = ([json.loads(x) for x in (tmp_path / n / "metrics.jsonl").open()] for n in ("whole", "halved"))
    whole_loss, halved_loss = ([line.get("loss", line.get("validation_loss")) for line in log] for log in logs)
    assert whole_loss == halved_loss
    assert main([*again, "--resume", "auto"]) == 0
    assert "finished before, at step 8" in capsys.readouterr().out


def test_a_run_stops_when_nothing_gets_better(snippets: tuple[str, str, str], tmp_path: Path) -> None:
    model, data, _ = snippets
    how: dict[str, Any] = {"steps": 50, "eval_every": 1, "patience": 2, "max_length": 16}
    result = finetune(config(model, data, tmp_path / "run", {"lr": 1e-9}, **how))
    assert result.report is not None
    assert result.report["stopped_early"]
    assert result.step == result.report["best_step"] + 2


def test_a_loss_that_stays_nan_ends_the_run(snippets: tuple[str, str, str], tmp_path: Path) -> None:
    model, data, _ = snippets
    tuner = Finetuner(config(model, data, tmp_path / "run", max_length=16))
    with torch.no_grad():
        tuner.model.classifier.bias.fill_(float("nan"))
    with pytest.raises(TrainError, match="step 10: no finite loss and gradient for 10 steps"):
        tuner.run()


def test_too_little_memory_is_one_line(
    snippets: tuple[str, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, _ = snippets
    tuner = Finetuner(config(model, data, tmp_path / "run", max_length=16))

    def fail(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(tuner.task, "loss", fail)
    with pytest.raises(TrainError) as error:
        tuner.run()
    assert str(error.value) == (
        "step 0: out of memory with 16 sequences a pass; --optim.batch 8 --optim.accumulation 2 keeps the tokens of a "
        "step; nothing was saved before"
    )


# ---- our own checkpoints ----


@pytest.mark.parametrize("layout", ["gpt2", "modern"])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_gpt_of_ours_goes_on_as_a_model_of_transformers(
    layout: str, tokenizer: str, settings, tmp_path: Path
) -> None:
    from bigmodel_fast.train import load_checkpoint, pretrain

    shape = {"layers": 2, "heads": 4, "width": 32, "context": 32, "layout": layout}
    shape |= {"kv_heads": 2} if layout == "modern" else {}
    pretrain(settings(steps=2, model=shape, tokenizer=tokenizer, vocab_size=270))
    checkpoint = load_checkpoint(tmp_path / "run")
    data = write_lines(tmp_path / "texts.jsonl", [{"text": f"{i}: all work and é no play"} for i in range(40)])
    tuner = Finetuner(config(str(tmp_path / "run"), data, tmp_path / "tuned", task="causal", steps=3))
    tokens = checkpoint.tokenizer().encode("all work é\n")
    assert tuner.source.tokenizer("all work é\n")["input_ids"] == tokens
    assert tuner.source.tokenizer.decode(tokens) == "all work é\n"
    assert tuner.source.tokenizer.eos_token_id == checkpoint.tokenizer().end
    with torch.no_grad():
        ids = torch.tensor([tokens])
        ours, theirs = checkpoint.model()(ids), tuner.model.eval()(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    report = tuner.run().report
    assert report is not None

    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned" / "model", local_files_only=True)
    assert type(saved).__name__ == {"gpt2": "GPT2LMHeadModel", "modern": "LlamaForCausalLM"}[layout]
    again = AutoTokenizer.from_pretrained(tmp_path / "tuned" / "model", local_files_only=True)
    assert again("all work é\n")["input_ids"] == tokens


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_bert_of_ours_goes_on_as_a_model_of_transformers(tokenizer: str, settings, tmp_path: Path) -> None:
    from bigmodel_fast.train import load_checkpoint, pretrain

    shape = {"layers": 2, "heads": 4, "width": 32, "context": 32}
    pretrain(settings(objective="mlm", steps=2, model=shape, tokenizer=tokenizer, vocab_size=270))
    checkpoint = load_checkpoint(tmp_path / "run")
    rows = [{"text": f"{i} {word} é", "label": word} for i in range(40) for word in ("work", "rest")]
    data = write_lines(tmp_path / "texts.jsonl", rows)
    tuner = Finetuner(config(str(tmp_path / "run"), data, tmp_path / "tuned", steps=3))
    assert set(tuner.new) == {
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    }
    own, made = checkpoint.tokenizer(), tuner.source.tokenizer
    words = own.encode("all work é\n")
    assert made("all work é\n")["input_ids"] == [own.end, *words, own.end]
    assert made("all", "work")["token_type_ids"] == [0] * (len(own.encode("all")) + 2) + [1] * (
        len(own.encode("work")) + 1
    )
    assert made.mask_token_id == own.vocab_size == checkpoint.model().config.vocab_size - 1
    batch = made(["all work é", "no"], padding=True, return_tensors="pt")
    lengths = batch["attention_mask"].sum(1)
    assert lengths[0] > lengths[1]
    with torch.no_grad():
        ours = checkpoint.model().hidden(batch["input_ids"], lengths=lengths)
        theirs = tuner.model.eval().bert(**batch).last_hidden_state * batch["attention_mask"][..., None]
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
    assert tuner.run().report is not None

    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned" / "model", local_files_only=True)
    assert type(saved).__name__ == "BertForSequenceClassification"
    again = AutoTokenizer.from_pretrained(tmp_path / "tuned" / "model", local_files_only=True)
    assert again("all work é\n")["input_ids"] == [own.end, *words, own.end]


def test_a_gpt_of_ours_becomes_a_classifier(settings, tmp_path: Path) -> None:
    from bigmodel_fast.train import pretrain

    pretrain(settings(steps=1, model={"layers": 1, "heads": 2, "width": 16, "context": 32}))
    data = write_lines(tmp_path / "texts.jsonl", [{"text": f"{i}", "label": i % 2} for i in range(40)])
    tuner = Finetuner(config(str(tmp_path / "run"), data, tmp_path / "tuned", steps=1))
    assert tuner.new == ["score.weight"]
    assert tuner.run().report is not None


def test_a_translator_of_ours_is_refused(settings, tmp_path: Path) -> None:
    from bigmodel_fast.train import pretrain

    (tmp_path / "pairs").mkdir()
    for split in ("train", "val"):
        for language in ("en", "de"):
            write_lines(tmp_path / "pairs" / f"{split}.{language}", [{"n": i} for i in range(20)])
    pretrain(settings(objective="seq2seq", data=str(tmp_path / "pairs"), steps=1, seq2seq={"languages": "en-de"}))
    with pytest.raises(ConfigError, match="is of objective seq2seq; clm and mlm can be fine-tuned"):
        Finetuner(config(str(tmp_path / "run"), None, tmp_path / "tuned"))

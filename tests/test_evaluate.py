"""bigmodel-fast evaluate: a run's figures again, other files, any Hugging Face folder, and the page of attributions."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tiny_models import PACKAGES, phrases, questions, tagged_code, tiny_bart, tiny_bert, word_tokenizer, write_lines

for package in PACKAGES:
    pytest.importorskip(package)

import torch  # noqa: E402

from bigmodel_fast.cli import main  # noqa: E402
from bigmodel_fast.train.attributions import explain  # noqa: E402
from bigmodel_fast.train.evaluation import EvaluateConfig, evaluate  # noqa: E402
from bigmodel_fast.train.finetune_config import FinetuneConfig  # noqa: E402
from bigmodel_fast.train.finetuning import finetune  # noqa: E402

HOSTILE = "<script>alert('x')</script> & \"good\""


def animals(most: int) -> list[dict[str, str]]:
    """Texts that name a cat (label <cat>) or a dog."""
    rows = [
        {"text": f"i saw a {('cat', 'dog')[i % 2]} number {i % 7}", "label": ("<cat>", "dog")[i % 2]}
        for i in range(most)
    ]
    return rows


def surprise() -> dict[str, str]:
    """What a model of animals gets wrong, and careless pages too."""
    return {"text": f"{HOSTILE} cat", "label": "dog"}


def tuned(out: Path, model: str, data: str, task: str, **how: Any) -> dict[str, Any]:
    values = {"model": model, "data": data, "task": task, "out": str(out), "validation_share": 0.2}
    report = finetune(FinetuneConfig.from_dict({**values, "optim": {"lr": 5e-3, "batch": 16}, **how})).report
    assert report is not None
    return report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, Any]]:
    """A run that tells cats from dogs, its data, and its report."""
    folder = tmp_path_factory.mktemp("animals")
    rows = animals(200)
    train = write_lines(folder / "train.jsonl", rows)
    data = write_lines(folder / "animals.jsonl", [*rows[:40], surprise()])
    model = tiny_bert(folder / "bert", [r["text"] for r in [*rows, surprise()]])
    report = tuned(folder / "run", model, train, "classify", steps=40, validation=data)
    assert report["metrics"]["accuracy"] > 0.95
    return folder / "run", data, report


def test_a_run_is_measured_again(
    run: tuple[Path, str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, report = run
    assert main(["evaluate", "--model", str(folder)]) == 0  # on what the run was validated on
    said = capsys.readouterr().out
    again = json.loads((folder / "evaluation" / "report.json").read_text())
    assert again["metrics"] == report["metrics"]
    assert again["confusion"] == report["confusion"]
    assert "41 examples" in said
    assert f"accuracy        {report['metrics']['accuracy']:12.4f}" in said
    assert (folder / "evaluation" / "confusion.png").read_bytes().startswith(b"\x89PNG")

    few = write_lines(tmp_path / "few.jsonl", animals(5))
    out = tmp_path / "out"
    argv = [
        "--model",
        str(folder / "model"),
        "--data",
        few,
        "--out",
        str(out),
        "--predictions",
        "--accelerate",
        "false",
    ]
    assert main(["evaluate", *argv]) == 0
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["where"] for line in lines] == [f"{few}:{i}" for i in range(1, 6)]
    assert [line["prediction"]["label"] for line in lines[:4]] == ["<cat>", "dog"] * 2
    assert json.loads((out / "report.json").read_text())["examples"] == 5


class Checker(HTMLParser):
    """Collects tags, and texts with the style of the element they stand in."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.words: list[tuple[str, float]] = []
        self._share: float | None = None

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.opened.append(tag)
        values = dict(attributes)
        self._share = float(values["title"]) if values.get("class") == "word" else None

    def handle_data(self, data: str) -> None:
        if self._share is not None:
            self.words.append((data, self._share))
            self._share = None


def test_attributions_find_the_word_that_decides(
    run: tuple[Path, str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("captum")
    folder, data, _ = run
    out = tmp_path / "out"
    argv = ["--model", str(folder), "--data", data, "--out", str(out), "--attributions", "12", "--dtype", "fp32"]
    assert main(["evaluate", *argv]) == 0
    assert "attributions.html" in capsys.readouterr().out
    text = (out / "attributions.html").read_text(encoding="utf-8")
    page = Checker()
    page.feed(text)
    assert page.opened.count("article") == 12
    assert "script" not in page.opened
    assert "&lt;cat&gt;" in text
    assert "http" not in text
    articles = re.findall(r"<article.*?</article>", text, re.DOTALL)
    assert "alert" in articles[0]  # the surest mistake comes first
    assert "&lt;</span>" in articles[0]
    assert 'class="wrong"' in articles[0]
    strongest = []
    for article in articles[1:]:
        found = Checker()
        found.feed(article)
        strongest.append(max(found.words, key=lambda word: word[1])[0])
    assert sum(word in ("cat", "dog") for word in strongest) >= 9  # of 11


def test_attributions_add_up(run: tuple[Path, str, dict[str, Any]]) -> None:
    """Completeness (Sundararajan et al. 2017): the shares sum to the difference of the logits."""
    pytest.importorskip("captum")
    from bigmodel_fast.data import read_examples
    from bigmodel_fast.train.judging import make_task
    from bigmodel_fast.train.pretrained import Pretrained

    folder, data, _ = run
    source = Pretrained.open(str(folder))
    task = make_task(FinetuneConfig(model=str(folder)), source)
    task.take_labels(source.labels)
    examples = read_examples(data, task.fields, {})[-3:]
    features = task.encode(examples)
    model, new = source.load(task)
    assert not new
    for feature, example in zip(features, examples, strict=True):
        said = {"label": "dog", "probability": 0.5}
        found = explain(model, task, feature, example, said, 256, 64, torch.device("cpu"))
        assert "".join(word.text for word in found.words) == example.text("text")
        total = sum(word.share for word in found.words if word.share is not None) + found.special
        assert total == pytest.approx(found.total, abs=0.02 * abs(found.total) + 0.01)
        assert found.gap == pytest.approx(found.total - total, abs=1e-5)


def test_other_tasks_are_measured_again(tmp_path: Path) -> None:
    rows = tagged_code(20)
    model = tiny_bert(tmp_path / "bert", (" ".join(r["tokens"]) for r in rows))
    data = write_lines(tmp_path / "code.jsonl", rows)
    report = tuned(tmp_path / "tags", model, data, "tokens", steps=10)
    found = evaluate(EvaluateConfig(model=str(tmp_path / "tags"))).report
    assert found["metrics"] == report["metrics"]
    assert found["entities"] == report["entities"]

    asked = questions(40)
    model = tiny_bert(tmp_path / "reader", [r["context"] for r in asked] + [asked[0]["question"]])
    data = write_lines(tmp_path / "qa.jsonl", asked)
    report = tuned(tmp_path / "answers", model, data, "qa", steps=5, max_length=40, stride=10)
    assert evaluate(EvaluateConfig(model=str(tmp_path / "answers"))).report["metrics"] == report["metrics"]

    pytest.importorskip("sacrebleu")
    pairs = phrases(40)
    model = tiny_bart(tmp_path / "bart", [f"{r['source']} {r['target']}" for r in pairs])
    data = write_lines(tmp_path / "pairs.jsonl", pairs)
    report = tuned(tmp_path / "words", model, data, "seq2seq", steps=5, max_new_tokens=8)
    assert evaluate(EvaluateConfig(model=str(tmp_path / "words"))).report["metrics"] == report["metrics"]
    silent = evaluate(EvaluateConfig(model=str(tmp_path / "words"), generate=False)).report["metrics"]
    assert "bleu" not in silent


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["evaluate", *argv]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


def test_bad_input_is_one_line(
    run: tuple[Path, str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, data, _ = run
    assert "there is no folder nowhere" in refused(["--model", "nowhere", "--task", "qa", "--data", data], capsys)
    bare = tiny_bert(tmp_path / "bert", ["a b"])
    assert "task must be given" in refused(["--model", bare, "--data", data], capsys)
    given = ["--model", bare, "--data", data, "--task", "classify"]
    assert "is no classifier; fine-tune it first" in refused(given, capsys)
    asked = write_lines(tmp_path / "qa.jsonl", questions(3))
    assert "has no weights for qa_outputs.bias" in refused(["--model", bare, "--data", asked, "--task", "qa"], capsys)
    assert "data must be given" in refused(["--model", str(bare), "--task", "qa"], capsys)
    model = str(folder)
    assert "attributions: only for task classify" in refused(
        ["--model", model, "--task", "tokens", "--attributions", "3"], capsys
    )
    assert "unknown label fish; the model's are <cat>, dog" in refused(
        ["--model", model, "--data", write_lines(tmp_path / "f.jsonl", [{"text": "a", "label": "fish"}])], capsys
    )
    assert "batch must be 1 or more, got 0" in refused(["--model", model, "--batch", "0"], capsys)


def test_a_model_that_others_fine_tuned(tmp_path: Path) -> None:
    """A folder without a run: the task comes from its config, the labels' names are its own."""
    from transformers import BertConfig, BertForSequenceClassification

    rows = animals(20)
    tokenizer = word_tokenizer(r["text"] for r in rows)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    names = {0: "dog", 1: "<cat>"}
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), id2label=names, **shape)).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_lines(tmp_path / "data.jsonl", rows)
    report = evaluate(EvaluateConfig(model=str(tmp_path / "model"), data=data, dtype="fp32")).report
    assert [c["name"] for c in report["classes"]] == ["dog", "<cat>"]
    batch = tokenizer([r["text"] for r in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        best = model(**batch).logits.argmax(1).tolist()
    right = sum(names[i] == row["label"] for i, row in zip(best, rows, strict=True)) / len(rows)
    assert report["metrics"]["accuracy"] == pytest.approx(right)

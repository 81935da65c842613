"""The example of federated fine-tuning: Flower's strategy and messages over clients that fine-tune a BERT of ours."""

import json
import re
from pathlib import Path
from types import ModuleType

import numerics
import pytest
import torch
from test_examples import ROOT, example

for package in ("flwr", "transformers", "safetensors", "matplotlib", "yaml", "sklearn", "tokenizers"):
    pytest.importorskip(package)
pytestmark = pytest.mark.skipif(not (ROOT / "examples").is_dir(), reason="needs the source tree")

from bigmodel_fast.train import FinetuneConfig, Finetuner, pretrain  # noqa: E402

WORDS = {"animal": ("cat", "dog", "hen"), "tool": ("saw", "axe", "fork")}


@pytest.fixture(scope="module")
def federated() -> ModuleType:
    return example("federated")


@pytest.fixture
def model(settings) -> str:
    """A BERT that `pretrain` has made."""
    shape = {"layers": 1, "heads": 2, "width": 32, "context": 16, "dropout": 0.0}
    run = settings(objective="mlm", steps=60, optim={"batch": 16}, model=shape)
    return str(pretrain(run).checkpoint)


@pytest.fixture
def tables(tmp_path: Path) -> list[str]:
    """Of clients of 20, 40 and 60 examples, each with words of its own, and of the server."""
    paths = []
    for i, count in enumerate((20, 40, 60, 40)):
        rows = [
            {"text": words[i] if i < 3 else words[n % 3], "label": label}
            for n in range(count // 2)
            for label, words in WORDS.items()
        ]
        path = tmp_path / f"table{i}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        paths.append(str(path))
    return paths


def test_a_round_averages_clients_by_their_examples(federated, model: str, tables: list[str], tmp_path: Path) -> None:
    def tuner(table: str, out: str) -> Finetuner:
        config = FinetuneConfig(model=model, data=table, validation=tables[3], out=str(tmp_path / out), steps=4)
        config.optim.lr, config.optim.batch, config.dtype = 1e-3, 8, "fp32"
        return Finetuner(config)

    server = tuner(tables[3], "server")
    start = {name: t.clone() for name, t in server.model.state_dict().items()}
    alone = []
    for i in range(3):
        client = tuner(tables[i], f"alone{i}")
        client.model.load_state_dict(start)
        for _ in range(4):
            client.train_step()
        alone.append(client.model.state_dict())
    clients = [tuner(table, f"client{i}") for i, table in enumerate(tables[:3])]
    result = federated.federate(clients, server, rounds=1)
    assert list(result.evaluate_metrics_serverapp) == [0, 1]
    for name, averaged in server.model.state_dict().items():
        each = torch.stack([weights[name] for weights in alone], -1)
        share = torch.tensor([20, 40, 60], dtype=torch.float64) / 120
        plain, exact = each @ share.float(), each.double() @ share
        numerics.assert_close(averaged, plain, exact, numerics.FORWARD, name)


def test_clients_learn_together_what_none_of_them_has(federated, model: str, tables: list[str], capsys) -> None:
    options = ["--rounds", "3", "--epochs", "8", "--lr", "1e-2", "--batch", "8", "--max-length", "8"]
    federated.main(["--model", model, "--data", *tables[:3], "--validation", tables[3], *options])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 clients of 16, 32, 48 examples"  # a fifth of each is its own to validate on
    reached = [float(re.match(r"round (\d+): accuracy ([\d.]+)% of 40 examples", line)[2]) for line in lines[1:]]
    assert len(reached) == 4
    assert reached[-1] > 75 > reached[0]  # a client that knew its own words alone would be right in two thirds
    with pytest.raises(SystemExit):
        federated.main(["--model", model, "--data", tables[0]])
    assert "--data and --validation go together" in capsys.readouterr().err

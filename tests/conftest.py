"""Every test starts from the instruction set and thread count the process started with, and small tensors meet kernels
too, where a user's would go to plain torch because that is faster; fixtures of training runs.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

import bigmodel_fast as bmf
from bigmodel_fast import _dispatch


@pytest.fixture(autouse=True)
def _as_started(monkeypatch):
    monkeypatch.setattr(_dispatch, "FEWEST", {op: (0, what) for op, (_, what) in _dispatch.FEWEST.items()})
    isa, threads = bmf.cpu_isa(), torch.get_num_threads()
    yield
    bmf.cpu_isa(isa)
    torch.set_num_threads(threads)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(30):
        (folder / f"{i}.txt").write_text(f"{i}: all work and no play makes a dull day")
    return folder


@pytest.fixture
def settings(corpus: Path, tmp_path: Path):
    """Makes the config of a tiny run; optim and model take what is given on top of theirs."""
    from bigmodel_fast.train import TrainConfig

    def make(out: str = "run", optim: dict | None = None, **given: Any) -> Any:
        return TrainConfig.from_dict(
            {
                "data": str(corpus),
                "tokenizer": "bytes",
                "out": str(tmp_path / out),
                "cache": str(tmp_path / "cache"),
                "steps": 8,
                "dtype": "fp32",
                "model": {"layers": 1, "heads": 2, "width": 32, "context": 16},
                "optim": {"batch": 4, "warmup": 2, "lr": 1e-2, **(optim or {})},
                **given,
            }
        )

    return make


@pytest.fixture
def copying(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Batches are copied one ahead, as on a GPU; what happens is appended to the list."""
    from bigmodel_fast.train.passes import Ahead

    events: list[str] = []
    initialise = Ahead.__init__

    def copies(self, *args) -> None:
        initialise(self, *args)
        self._copies = "a stream"

    monkeypatch.setattr(Ahead, "__init__", copies)
    monkeypatch.setattr(Ahead, "_copy", lambda self, t: events.append("copy") or t.clone())
    monkeypatch.setattr(Ahead, "_wait_for", lambda self, batch: events.append("wait"))
    return events

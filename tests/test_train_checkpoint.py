"""Checkpoints: whole or not there, verified when read, the last good one kept."""

import json
from pathlib import Path

import pytest
import torch

from bigmodel_fast.data import Tokenizer
from bigmodel_fast.models import GPT, GPTConfig
from bigmodel_fast.optim import AdamW

pytest.importorskip("safetensors")

from bigmodel_fast.train import CheckpointError, load_checkpoint, newest_checkpoint, save_checkpoint

SHAPE = {"vocab_size": 257, "context": 8, "layers": 1, "heads": 2, "width": 16}


def trained(**changes) -> tuple[GPT, AdamW]:
    """A model and its optimizer after one step, so that the optimizer has states."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **changes}))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    optimizer = AdamW([{"params": matrices}, {"params": [p for p in model.parameters() if p.dim() == 1]}], lr=1e-3)
    tokens = torch.randint(257, (2, 8))
    model(tokens, tokens).backward()
    optimizer.step()
    return model, optimizer


def save(run: Path, step: int, keep: int = 2, parts: tuple[GPT, AdamW] | None = None) -> Path:
    model, optimizer = parts or trained()
    return save_checkpoint(
        run / "checkpoints",
        step=step,
        model=model,
        optimizer=optimizer,
        tokenizer=Tokenizer(),
        state={"model": SHAPE, "note": "ü"},
        keep=keep,
    )


def names(run: Path) -> list[str]:
    found = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert found.pop(0) == "LATEST"
    assert (run / "checkpoints" / "LATEST").read_text() == found[-1] + "\n"
    return found


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_everything_comes_back(tmp_path: Path) -> None:
    model, optimizer = trained()
    checkpoint = load_checkpoint(save(tmp_path, 7, parts=(model, optimizer)))
    assert (checkpoint.step, checkpoint.state["note"]) == (7, "ü")
    again = checkpoint.model()
    assert not again.training
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    fresh, blank = trained()
    for p in fresh.parameters():
        torch.nn.init.zeros_(p)
    blank.state.clear()
    checkpoint.restore(fresh, blank)
    for p, q in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == blank.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert torch.equal(value, blank.state[q][key])
    assert checkpoint.tokenizer().encode("é") == [0xC3, 0xA9]


def test_no_file_of_it_is_a_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert sorted(f.name for f in path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
        "tokenizer.json",
    ]
    json.loads((path / "state.json").read_text())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 20):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000020"]
    save(tmp_path, 30, keep=1)
    assert names(tmp_path) == ["step-00000030"]


def test_a_write_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, keep=1)

    def full(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("bigmodel_fast.train.durable.flush", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000001"]
    assert load_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "tokenizer.json", "state.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink])
def test_a_damaged_file_is_found_and_the_checkpoint_before_taken(tmp_path: Path, file: str, damage) -> None:
    save(tmp_path, 1)
    last = save(tmp_path, 2)
    if file == "state.json" and damage is flip_a_bit:
        (last / file).write_text("[]")  # JSON, but none of ours
    else:
        damage(last / file)
    with pytest.raises(CheckpointError, match=rf"step-00000002.*{file}"):
        load_checkpoint(last)
    found, damaged = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == load_checkpoint(tmp_path).step == 1
    assert len(damaged) == 1
    assert file in damaged[0]
    save(tmp_path, 2)  # when the run comes by again
    assert load_checkpoint(tmp_path).step == 2


def test_a_damaged_later_one_does_not_push_out_a_good_one(tmp_path: Path) -> None:
    save(tmp_path, 1)
    truncate(save(tmp_path, 9) / "model.safetensors")
    save(tmp_path, 5, keep=1)
    assert load_checkpoint(tmp_path).step == 5


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        load_checkpoint(tmp_path / "nowhere")
    (tmp_path / "checkpoints" / "step-0000000x").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint in it"):
        load_checkpoint(tmp_path)
    path = save(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(path)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(save(tmp_path, 1))
    for other in (trained(width=32), trained(layers=2), trained(layout="modern")):
        with pytest.raises(CheckpointError, match="another model"):
            checkpoint.restore(*other)

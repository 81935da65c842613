"""torch.compile over accelerated models of transformers, tiny and random, against the stock model as it is."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import bigmodel_fast as bmf

pytest.importorskip("transformers", minversion="5", reason="transformers 5 is not installed")

import test_accelerate_encoders as encoders
import test_accelerate_seq2seq as seq2seq
import test_accelerate_vision_speech as others

ENCODERS = ("DistilBertForSequenceClassification", "DistilBertForTokenClassification", "ModernBertForMaskedLM")
FAMILIES = (*ENCODERS, "t5", "bart", "plbart", "vit", "clip", "whisper", "wav2vec2", "wav2vec2, norm first")


def example(family: str) -> tuple[nn.Module, dict[str, Any]]:
    """A model of one layer, or as few as say something, and what it is called with."""
    if family in ENCODERS:
        windowed = {"num_hidden_layers": 2}  # ModernBERT: a layer with a window, and one without
        layers: dict[str, Any] = {"n_layers": 1} if family.startswith("Distil") else windowed
        return encoders.make(family, **layers), encoders.inputs(family)
    if family in ("t5", "bart", "plbart"):
        layers = {"num_layers": 1} if family == "t5" else {"encoder_layers": 1, "decoder_layers": 1}
        if family == "plbart":
            family, layers["cls"] = "bart", "PLBartForConditionalGeneration"
        return seq2seq.make(family, **layers), {"input_ids": seq2seq.TOKENS, **seq2seq.EXAMPLE}
    layers = {"num_hidden_layers": 1}
    if family == "clip":
        layers = {name: {**tower, **layers} for name, tower in others.FAMILIES[family][1].items() if "config" in name}
    if family == "whisper":
        layers = {"encoder_layers": 1, "decoder_layers": 1}
    return others.make(family, **layers), others.FAMILIES[family][2]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_compiled_model(family: str) -> None:
    """Loss and gradients in training, logits and loss in evaluation, in one graph where the stock model is one.

    By aot_eager and eager, which trace forward and backward, and forward; inductor takes longer.
    """
    stock, given = example(family)
    fast = copy.deepcopy(stock)
    bmf.accelerate(fast)
    whole = not family.startswith("wav2vec2")
    evaluated, trained = (torch.compile(fast, fullgraph=whole, backend=backend) for backend in ("eager", "aot_eager"))
    logits = "logits_per_image" if family == "clip" else "logits"
    try:
        found, expected = trained.train()(**given).loss, stock.train()(**given).loss
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for loss in (found, expected):
            loss.backward()
        with torch.no_grad():
            found, expected = evaluated.eval()(**given), stock.eval()(**given)
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found[logits], expected[logits], rtol=1e-4, atol=1e-4)
    finally:
        torch._dynamo.reset()
    scale = max(float(p.grad.abs().max()) for p in stock.parameters() if p.grad is not None)
    for (name, p), q in zip(fast.named_parameters(), stock.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4 * scale, msg=lambda m, n=name: f"{n}: {m}")

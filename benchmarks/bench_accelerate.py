"""A fine-tuning step of a BERT of transformers, as it is and after bmf.accelerate: forward, loss, backward, AdamW.

The shape is MiniLM's with a classifier on top, its weights random; the step is the one of any fine-tuning loop, with
dropout at work. All providers start from the same weights, see the same batches and use torch's fused AdamW.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

import bigmodel_fast as bmf

from .cases import BENCH_SEED, Case, Results, StepBenchmark, StepTask, autocast

LR, BATCHES, CLASSES = 2e-5, 2, 2

Batch = dict[str, Tensor]


@dataclass
class Inputs:
    weights: dict[str, Tensor]
    batches: list[Batch]


def make_model(case: Case) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BENCH_SEED)
        return BertForSequenceClassification(BertConfig(**{**case.options["config"], "num_labels": CLASSES}))


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(BENCH_SEED)
    batch, length = case.options["batch"]
    classes = case.options["config"]["vocab_size"]

    def draw(high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    batches = []
    for _ in range(BATCHES):
        mask = torch.ones(batch, length, dtype=torch.int64, device=device)
        if case.options["padded"]:
            lengths = draw(length + 1, batch, low=length // 4)
            mask = (torch.arange(length, device=device) < lengths[:, None]).long()
        tokens = draw(classes, batch, length, low=1) * mask  # 0 is the padding token
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": draw(CLASSES, batch)})
    return Inputs(make_model(case).to(device).state_dict(), batches)


def loss_and_gradients(model: nn.Module, batch: Batch, dtype: str) -> Tensor:
    model.zero_grad(set_to_none=True)
    with autocast(dtype, batch["input_ids"].device):
        loss = model(**batch).loss
    loss.backward()
    return loss.detach()


def results_of(model: nn.Module, batch: Batch, dtype: str) -> Results:
    """Gradients of one layer together: some are 0 but for rounding, such as those of keys' biases."""
    found = {"output loss": loss_and_gradients(model, batch, dtype).float()}
    layers: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if p.grad is not None:
            layer = re.match(r".*\.\d+(?=\.)|[^.]+", name)
            layers.setdefault(layer[0] if layer else name, []).append(p.grad.flatten())
    return found | {f"grad {name}": torch.cat(grads) for name, grads in layers.items()}


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

        # Random numbers cannot be compared, so results are checked without dropout.
        return StepTask(step, lambda: results_of(model.eval(), inputs.batches[0], dtype))

    return build


def exact(case: Case, inputs: Inputs) -> Results:
    model = make_model(case).to(inputs.batches[0]["input_ids"].device)
    model.load_state_dict(inputs.weights)
    return results_of(model.double().eval(), inputs.batches[0], "fp64")


def flops(case: Case, inputs: Inputs) -> float:
    """6 for each weight of a product and token, 12 length width a layer and token for attention; padding is counted."""
    batch, length = case.options["batch"]
    config = case.options["config"]
    width, layers = config["hidden_size"], config["num_hidden_layers"]
    products = layers * (4 * width**2 + 2 * width * config["intermediate_size"])
    return (6.0 * products + 12.0 * layers * width * length) * batch * length


def case(name: str, batch: int, length: int, padded: bool, config: dict[str, Any], **how: Any) -> Case:
    options = {"config": config, "batch": (batch, length), "padded": padded}
    return Case(f"{name}, {batch}x{length} tokens", options=options, **how)


MINILM = {
    "vocab_size": 30522,
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
}
TINY = {
    "vocab_size": 67,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
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
        case("MiniLM", 32, 128, False, MINILM, quick=True, compiled=("bf16",)),
        case("MiniLM, padded", 32, 128, True, MINILM, dtypes=("bf16",)),
    ),
    cuda_cases=(case("MiniLM", 256, 128, False, MINILM, quick=True, compiled=("bf16",), dtypes=("bf16",)),),
    tiny=case("tiny", 2, 8, True, TINY, compiled=("bf16", "fp32")),
)

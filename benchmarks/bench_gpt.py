"""A whole training step of a GPT: forward, loss, backward, clipping by norm, AdamW.

"eager" is baseline_gpt.PlainGPT with torch's fused AdamW; "compile" is the same model through torch.compile. All start
from the same weights and see the same batches.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel_fast import optim
from bigmodel_fast.models import GPT, GPTConfig

from .baseline_gpt import PlainGPT
from .cases import BENCH_SEED, Case, Results, StepBenchmark, StepTask, autocast

LR, CLIP, BATCHES = 1e-4, 1.0, 2


@dataclass
class Inputs:
    weights: dict[str, Tensor]
    batches: list[tuple[Tensor, Tensor]]  # tokens and targets, [B, S]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    config, shape = case.options["config"], case.options["batch"]
    generator = torch.Generator().manual_seed(BENCH_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BENCH_SEED)
        model = GPT(config).to(device)
    tokens = [torch.randint(config.vocab_size, shape, generator=generator).to(device) for _ in range(BATCHES)]
    return Inputs(model.state_dict(), [(t, t.roll(-1, 1)) for t in tokens])


def loss_and_gradients(model: nn.Module, tokens: Tensor, targets: Tensor, dtype: str) -> Tensor:
    model.zero_grad(set_to_none=True)
    with autocast(dtype, tokens.device):
        loss = model(tokens, targets)
    loss.backward()
    return loss.detach()


def results_of(model: nn.Module, inputs: Inputs, dtype: str) -> Results:
    found = {"output loss": loss_and_gradients(model, *inputs.batches[0], dtype)}
    gradients = {f"grad {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | gradients


def builder(make: Callable[[GPTConfig], nn.Module], optimizer: Callable, clip: Callable, compiled: bool = False):
    def build(case: Case, inputs: Inputs, dtype: str) -> StepTask:
        model = make(case.options["config"]).to(inputs.batches[0][0].device)
        model.load_state_dict(inputs.weights)
        if compiled:
            model.compile(dynamic=False)
        updates = optimizer(model.parameters(), lr=LR)
        batches = cycle(inputs.batches)

        def step() -> None:
            loss_and_gradients(model, *next(batches), dtype)
            clip(model.parameters(), CLIP)
            updates.step()

        return StepTask(step, lambda: results_of(model, inputs, dtype))

    return build


def exact(case: Case, inputs: Inputs) -> Results:
    model = PlainGPT(case.options["config"]).to(inputs.batches[0][0].device)
    model.load_state_dict(inputs.weights)
    return results_of(model.double(), inputs, "fp64")


def flops(case: Case, inputs: Inputs) -> float:
    with torch.device("meta"):
        model = GPT(case.options["config"])
    batch, length = case.options["batch"]
    return model.flops_per_token(length) * batch * length


def fused_adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def case(name: str, batch: int, length: int, config: dict[str, Any], **how: Any) -> Case:
    options = {"config": GPTConfig(context=length, **config), "batch": (batch, length)}
    return Case(f"{name}, {batch}x{length} tokens", options=options, **how)


CHARACTERS = {"vocab_size": 65, "width": 384, "layers": 6, "heads": 6}
WORDS = {"vocab_size": 50304, "width": 768, "layers": 4, "heads": 12}
BOTH = ("bf16", "fp32")

BENCHMARK = StepBenchmark(
    name="gpt",
    unit="FLOP",
    builders={
        "bigmodel_fast": builder(GPT, optim.AdamW, optim.clip_grad_norm_),
        "eager": builder(PlainGPT, fused_adamw, nn.utils.clip_grad_norm_),
        "compile": builder(PlainGPT, fused_adamw, nn.utils.clip_grad_norm_, compiled=True),
    },
    make_inputs=make_inputs,
    make_exact=exact,
    count=flops,
    cases=(
        case("384 wide, vocabulary 65", 16, 256, CHARACTERS, quick=True, compiled=BOTH),
        case("768 wide, vocabulary 50304", 4, 512, WORDS, compiled=("bf16",)),
        case(
            "modern, 768 wide, vocabulary 50304", 4, 512, {**WORDS, "kv_heads": 4, "layout": "modern"}, dtypes=("bf16",)
        ),
    ),
    tiny=case("tiny", 2, 8, {"vocab_size": 67, "width": 16, "layers": 2, "heads": 2}, compiled=BOTH),
)

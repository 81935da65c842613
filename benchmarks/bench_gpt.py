"""A whole training step of a GPT: forward, loss, backward, clipping by norm, AdamW.

"eager" is baseline_gpt.PlainGPT with torch's fused AdamW; "compile" is the same model through torch.compile; on a GPU
both are also run with attention by cuDNN, and "bigmodel_fast graph" replays forward and backward as one CUDA graph. All
start from the same weights and see the same batches.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bigmodel_fast import optim
from bigmodel_fast.models import GPT, GPTConfig

from .baseline_gpt import PlainGPT
from .cases import BENCH_SEED, Case, Results, StepBenchmark, StepTask, autocast

LR, CLIP, BATCHES = 1e-4, 1.0, 2
EXACT_TOKENS = 2048  # that go through the model in float64 at once
GRAPH_WARM_UPS = 3


@dataclass
class Inputs:
    weights: dict[str, Tensor]
    batches: list[tuple[Tensor, Tensor]]  # tokens and targets, [B, S]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    config, shape = case.options["config"], case.options["batch"]
    generator = torch.Generator(device).manual_seed(BENCH_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BENCH_SEED)
        model = GPT(config).to(device)
    tokens = [torch.randint(config.vocab_size, shape, generator=generator, device=device) for _ in range(BATCHES)]
    return Inputs(model.state_dict(), [(t, t.roll(-1, 1)) for t in tokens])


def loss_and_gradients(model: nn.Module, tokens: Tensor, targets: Tensor, dtype: str) -> Tensor:
    model.zero_grad(set_to_none=True)
    with autocast(dtype, tokens.device):
        loss = model(tokens, targets)
    loss.backward()
    return loss.detach()


class GraphedPass:
    """`loss_and_gradients` as a CUDA graph, recorded at the first call and replayed: one launch for the host."""

    def __init__(self) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, model: nn.Module, tokens: Tensor, targets: Tensor, dtype: str) -> Tensor:
        if self.graph is None:
            self.tokens, self.targets = tokens.clone(), targets.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what is compiled or allocated at a first call cannot be recorded
                for _ in range(GRAPH_WARM_UPS):
                    loss_and_gradients(model, self.tokens, self.targets, dtype)
            torch.cuda.current_stream().wait_stream(stream)
            model.zero_grad(set_to_none=True)  # gradients are to be the graph's own
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.loss = loss_and_gradients(model, self.tokens, self.targets, dtype)
        self.tokens.copy_(tokens)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.loss


def results_of(model: nn.Module, batch: tuple[Tensor, Tensor], dtype: str, run: Callable) -> Results:
    found = {"output loss": run(model, *batch, dtype).clone()}
    gradients = {f"grad {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | gradients


def builder(
    make: Callable[[GPTConfig], nn.Module],
    optimizer: Callable,
    clip: Callable,
    compiled: bool = False,
    graphed: bool = False,
    attention: SDPBackend | None = None,
):
    """attention: the backend of PlainGPT's; None for the one that torch chooses."""

    def chosen() -> AbstractContextManager:
        return nullcontext() if attention is None else sdpa_kernel(attention)

    def build(case: Case, inputs: Inputs, dtype: str) -> StepTask:
        model = make(case.options["config"]).to(inputs.batches[0][0].device)
        model.load_state_dict(inputs.weights)
        if compiled:
            model.compile(dynamic=False)
        updates = optimizer(model.parameters(), lr=LR)
        batches = cycle(inputs.batches)
        run = GraphedPass() if graphed else loss_and_gradients

        def step() -> None:
            with chosen():
                run(model, *next(batches), dtype)
            clip(model.parameters(), CLIP)
            updates.step()

        def results() -> Results:
            with chosen():
                return results_of(model, inputs.batches[0], dtype, run)

        return StepTask(step, results)

    return build


def exact(case: Case, inputs: Inputs) -> Results:
    """Some sequences after the others: the mean over all tokens is the mean of theirs, and memory stays bounded."""
    tokens, targets = inputs.batches[0]
    model = PlainGPT(case.options["config"]).to(tokens.device)
    model.load_state_dict(inputs.weights)
    model.double()
    rows = max(1, EXACT_TOKENS // tokens.shape[1])
    total: Results = {}
    for part in zip(tokens.split(rows), targets.split(rows), strict=True):
        share = len(part[0]) / len(tokens)
        for name, value in results_of(model, part, "fp64", loss_and_gradients).items():
            total[name] = total[name].add_(value, alpha=share) if name in total else value * share
    return total


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
GPT2 = {"vocab_size": 50304, "width": 768, "layers": 12, "heads": 12}  # 124M, its vocabulary padded as in llm.c
BOTH = ("bf16", "fp32")
plain = partial(builder, PlainGPT, fused_adamw, nn.utils.clip_grad_norm_)

BENCHMARK = StepBenchmark(
    name="gpt",
    unit="FLOP",
    builders={
        "bigmodel_fast": builder(GPT, optim.AdamW, optim.clip_grad_norm_),
        "eager": plain(),
        "compile": plain(compiled=True),
    },
    cuda_builders={
        "bigmodel_fast graph": builder(GPT, optim.AdamW, optim.clip_grad_norm_, graphed=True),
        "eager cudnn": plain(attention=SDPBackend.CUDNN_ATTENTION),
        "compile cudnn": plain(attention=SDPBackend.CUDNN_ATTENTION, compiled=True),
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
    cuda_cases=(
        case("gpt2 124M", 32, 1024, GPT2, quick=True, compiled=("bf16",), dtypes=("bf16",)),
        # llm.c's batch, whose logits alone take 13 GB in float32.
        case("gpt2 124M", 64, 1024, GPT2, dtypes=("bf16",), providers=("bigmodel_fast", "eager", "eager cudnn")),
        case("gpt2 124M", 8, 1024, GPT2, dtypes=("bf16",), providers=("bigmodel_fast", "bigmodel_fast graph", "eager")),
        case(
            "modern, 2048 wide, 4 layers",
            8,
            2048,
            {"vocab_size": 50304, "width": 2048, "layers": 4, "heads": 16, "kv_heads": 4, "layout": "modern"},
            dtypes=("bf16",),
            providers=("bigmodel_fast", "eager", "eager cudnn"),
        ),
    ),
    tiny=case("tiny", 2, 8, {"vocab_size": 67, "width": 16, "layers": 2, "heads": 2}, compiled=BOTH),
)

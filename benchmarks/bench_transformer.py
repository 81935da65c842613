"""A step of translation with an encoder and decoder: forward, smoothed loss, backward, AdamW, dropout at work.

"eager" is torch.nn.Transformer on batches that are padded to their longest, with the masks that takes. Both start from
the same weights and see the same pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bigmodel_fast import optim
from bigmodel_fast.models import Transformer, TransformerConfig, pack
from bigmodel_fast.models.transformer import sinusoids

from .cases import BENCH_SEED, Case, Results, StepBenchmark, StepTask, autocast

LR, BATCHES, SMOOTHING, NO_TARGET = 1e-4, 2, 0.1, -100

Pairs = tuple[list[list[int]], list[list[int]]]  # sources and targets


class PlainTransformer(nn.Transformer):
    """torch's Transformer with tied embeddings and a loss, and the state dict of models.Transformer."""

    table: Tensor

    def __init__(self, config: TransformerConfig):
        super().__init__(
            config.width,
            config.heads,
            config.layers,
            config.layers,
            config.hidden,
            config.dropout,
            norm_first=config.norm_first,
            batch_first=True,
        )
        for module in self.modules():  # the paper's dropout is of what is added to the stream
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
            if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                module.dropout.p = 0.0
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.embedded = nn.Dropout(config.dropout)
        self.register_buffer("table", sinusoids(config.context, config.width), persistent=False)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.embedded(self.embedding(tokens) * math.sqrt(self.d_model) + self.table[: tokens.shape[1]])

    def loss(self, source: Tensor, absent: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """Of padded source, target and labels [B, S], absent: where the source is padded."""
        x = self(
            self.embed(source),
            self.embed(target),
            tgt_mask=self.generate_square_subsequent_mask(target.shape[1], target.device).isinf(),
            src_key_padding_mask=absent,
            memory_key_padding_mask=absent,
            tgt_is_causal=True,
        )
        logits = F.linear(x, self.embedding.weight).flatten(0, 1)
        return F.cross_entropy(logits, labels.flatten(), ignore_index=NO_TARGET, label_smoothing=SMOOTHING)


def packed(pairs: Pairs, device: torch.device) -> tuple[Tensor, ...]:
    sources, targets = pairs
    (target, starts), (labels, _) = pack([t[:-1] for t in targets], device), pack([t[1:] for t in targets], device)
    return *pack(sources, device), target, starts, labels


def padded(pairs: Pairs, device: torch.device) -> tuple[Tensor, ...]:
    def pad(sequences: list[list[int]], value: int) -> Tensor:
        return pad_sequence([torch.tensor(s, device=device) for s in sequences], batch_first=True, padding_value=value)

    sources, targets = pairs
    source = pad(sources, -1)
    target, labels = pad([t[:-1] for t in targets], 0), pad([t[1:] for t in targets], NO_TARGET)
    return source.clamp(min=0), source == -1, target, labels


def our_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    return model(*batch, label_smoothing=SMOOTHING)


def plain_loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    assert isinstance(model, PlainTransformer)
    return model.loss(*batch)


@dataclass
class Inputs:
    weights: dict[str, Tensor]
    batches: list[Pairs]
    device: torch.device


def make_inputs(case: Case, device: torch.device) -> Inputs:
    config, (count, shortest, longest) = case.options["config"], case.options["batch"]
    generator = torch.Generator().manual_seed(BENCH_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BENCH_SEED)
        model = Transformer(config).to(device)

    def draw() -> list[list[int]]:
        lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
        return [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in lengths]

    return Inputs(model.state_dict(), [(draw(), draw()) for _ in range(BATCHES)], device)


def loss_and_gradients(model: nn.Module, loss_of: Callable, batch: tuple[Tensor, ...], dtype: str) -> Tensor:
    model.zero_grad(set_to_none=True)
    with autocast(dtype, batch[0].device):
        loss = loss_of(model, batch)
    loss.backward()
    return loss.detach()


def results_of(model: nn.Module, loss_of: Callable, batch: tuple[Tensor, ...], dtype: str) -> Results:
    """Without dropout: random numbers cannot be compared."""
    loss = loss_and_gradients(model.eval(), loss_of, batch, dtype).float()
    grads = {f"grad {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"output loss": loss} | grads


def builder(make: Callable, loss_of: Callable, batched: Callable, optimizer: Callable):
    def build(case: Case, inputs: Inputs, dtype: str) -> StepTask:
        model = make(case.options["config"]).to(inputs.device)
        model.load_state_dict(inputs.weights)
        updates = optimizer(model.parameters(), lr=LR)
        made = [batched(pairs, inputs.device) for pairs in inputs.batches]
        batches = cycle(made)

        def step() -> None:
            loss_and_gradients(model.train(), loss_of, next(batches), dtype)
            updates.step()

        return StepTask(step, lambda: results_of(model, loss_of, made[0], dtype))

    return build


def exact(case: Case, inputs: Inputs) -> Results:
    model = PlainTransformer(case.options["config"]).to(inputs.device)
    model.load_state_dict(inputs.weights)
    return results_of(model.double(), plain_loss, padded(inputs.batches[0], inputs.device), "fp64")


def flops(case: Case, inputs: Inputs) -> float:
    """Of the tokens there are; padding does not count."""
    with torch.device("meta"):
        model = Transformer(case.options["config"])
    sources, targets = ([len(s) for s in side] for side in inputs.batches[0])
    return sum(model.flops(s, t - 1, s, t - 1) for s, t in zip(sources, targets, strict=True))


def fused_adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def case(name: str, pairs: int, lengths: tuple[int, int], config: dict[str, Any], **how: Any) -> Case:
    options = {"config": TransformerConfig(context=lengths[1], **config), "batch": (pairs, *lengths)}
    return Case(f"{name}, {pairs} pairs of {lengths[0]}-{lengths[1]} tokens", options=options, **how)


SMALL = {"vocab_size": 8192, "width": 256, "layers": 3, "heads": 4}

BENCHMARK = StepBenchmark(
    name="transformer",
    unit="FLOP",
    builders={
        "bigmodel_fast": builder(Transformer, our_loss, packed, optim.AdamW),
        "eager": builder(PlainTransformer, plain_loss, padded, fused_adamw),
    },
    make_inputs=make_inputs,
    make_exact=exact,
    count=flops,
    cases=(
        case("256 wide, 3 layers, vocabulary 8192", 128, (8, 32), SMALL, quick=True, dtypes=("bf16",)),
        case("the same, lengths alike", 128, (18, 22), SMALL, dtypes=("bf16",)),
        case("base model, vocabulary 16384", 32, (10, 60), {"vocab_size": 16384}, dtypes=("bf16",)),
    ),
    cuda_cases=(case("base model, vocabulary 32000", 512, (10, 90), {}, dtypes=("bf16",), quick=True),),
    tiny=case("tiny", 3, (2, 8), {"vocab_size": 67, "width": 16, "layers": 2, "heads": 2}),
)

"""A step of masked language modelling with a BERT: forward, loss, backward, AdamW, dropout at work.

"eager" is BertForMaskedLM of transformers, which makes logits of all positions; "eager gathered" is the same model with
the head applied to masked positions only, as a careful user would write it. All start from the same weights and see the
same batches.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigmodel_fast import optim
from bigmodel_fast.models import BERT, BERTConfig

from .cases import BENCH_SEED, Case, Results, StepBenchmark, StepTask, autocast

LR, BATCHES, MASKED = 1e-4, 2, 0.15

Batch = tuple[Tensor, Tensor, Tensor]  # tokens [B, S], positions and targets [B, P]
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass
class Inputs:
    weights: dict[str, Tensor]  # by Hugging Face's names
    batches: list[Batch]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    config, (batch, length) = case.options["config"], case.options["batch"]
    generator = torch.Generator(device).manual_seed(BENCH_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BENCH_SEED)
        model = BERT(config).to(device)

    def draw(*shape: int) -> Tensor:
        return torch.randint(config.vocab_size, shape, generator=generator, device=device)

    batches = []
    for _ in range(BATCHES):
        count = max(1, round(MASKED * length))
        positions = torch.rand(batch, length, generator=generator, device=device).argsort(1)[:, :count]
        batches.append((draw(batch, length), positions, draw(batch, count)))
    return Inputs(model.hf_state_dict(), batches)


def ours(case: Case, inputs: Inputs) -> BERT:
    model = BERT(case.options["config"])
    model.load_hf_state_dict(inputs.weights)
    return model


def plain(case: Case, inputs: Inputs) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(BertConfig(**BERT(case.options["config"]).hf_config()))
    model.load_state_dict(inputs.weights)
    return model


def our_loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(*batch)


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    tokens, positions, targets = batch
    return model(tokens, labels=torch.full_like(tokens, -100).scatter(1, positions, targets)).loss


def gathered_loss(model: Any, batch: Batch) -> Tensor:
    tokens, positions, targets = batch
    hidden = model.bert(tokens).last_hidden_state
    picked = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))
    return F.cross_entropy(model.cls(picked).flatten(0, 1).float(), targets.flatten())


def gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """By our names, whichever model has them."""
    own = dict(model.named_parameters())
    shape = model.config if isinstance(model, BERT) else _config(model)
    with torch.device("meta"):
        names = [*BERT(shape)._hf_names()]
    for name, parts in names:
        found = [own[name].grad] if name in own else [own[part].grad for part in parts]
        yield f"grad {name}", torch.cat([g for g in found if g is not None])


def _config(model: Any) -> BERTConfig:
    c = model.config
    return BERTConfig(
        c.vocab_size, c.max_position_embeddings, c.num_hidden_layers, c.num_attention_heads, c.hidden_size
    )


def loss_and_gradients(model: nn.Module, loss_of: Loss, batch: Batch, dtype: str) -> Tensor:
    model.zero_grad(set_to_none=True)
    with autocast(dtype, batch[0].device):
        loss = loss_of(model, batch)
    loss.backward()
    return loss.detach()


def results_of(model: nn.Module, loss_of: Loss, batch: Batch, dtype: str) -> Results:
    """Without dropout: random numbers cannot be compared."""
    loss = loss_and_gradients(model.eval(), loss_of, batch, dtype).float()
    return {"output loss": loss, **{name: g.clone() for name, g in gradients(model)}}


def builder(make: Callable[[Case, Inputs], nn.Module], loss_of: Loss, optimizer: Callable):
    def build(case: Case, inputs: Inputs, dtype: str) -> StepTask:
        model = make(case, inputs).to(inputs.batches[0][0].device)
        updates = optimizer(model.parameters(), lr=LR)
        batches = cycle(inputs.batches)

        def step() -> None:
            loss_and_gradients(model.train(), loss_of, next(batches), dtype)
            updates.step()

        return StepTask(step, lambda: results_of(model, loss_of, inputs.batches[0], dtype))

    return build


def exact(case: Case, inputs: Inputs) -> Results:
    model = plain(case, inputs).to(inputs.batches[0][0].device).double()
    return results_of(model, plain_loss, inputs.batches[0], "fp64")


def flops(case: Case, inputs: Inputs) -> float:
    batch, length = case.options["batch"]
    with torch.device("meta"):
        model = BERT(case.options["config"])
    return model.flops_per_token(length, max(1, round(MASKED * length)) / length) * batch * length


def fused_adamw(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, fused=True)


def case(name: str, batch: int, length: int, config: dict[str, Any], **how: Any) -> Case:
    options = {"config": BERTConfig(context=length, **config), "batch": (batch, length)}
    return Case(f"{name}, {batch}x{length} tokens", options=options, **how)


BENCHMARK = StepBenchmark(
    name="bert",
    requires="transformers",
    unit="FLOP",
    builders={
        "bigmodel_fast": builder(ours, our_loss, optim.AdamW),
        "eager": builder(plain, plain_loss, fused_adamw),
        "eager gathered": builder(plain, gathered_loss, fused_adamw),
    },
    make_inputs=make_inputs,
    make_exact=exact,
    count=flops,
    cases=(
        case(
            "384 wide, 6 layers, vocabulary 8192",
            16,
            128,
            {"vocab_size": 8192, "width": 384, "layers": 6, "heads": 6},
            quick=True,
            dtypes=("bf16",),
        ),
        case("bert-base, 3 layers", 8, 128, {"layers": 3}, dtypes=("bf16",)),
    ),
    cuda_cases=(case("bert-base", 64, 512, {}, dtypes=("bf16",), quick=True),),
    tiny=case("tiny", 2, 8, {"vocab_size": 67, "width": 16, "layers": 2, "heads": 2}),
)

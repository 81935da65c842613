"""A whole training step of a ViT: forward, loss, backward, AdamW.

"eager" is torchvision's VisionTransformer with torch's AdamW, from the same weights and on the same images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigmodel_fast import ops, optim
from bigmodel_fast.models import ViT, ViTConfig

from .cases import BENCH_SEED, Case, Results, StepBenchmark, StepTask, autocast

LR = 1e-4


@dataclass
class Inputs:
    weights: dict[str, Tensor]
    images: Tensor
    labels: Tensor


def plain(config: ViTConfig) -> nn.Module:
    from torchvision.models import VisionTransformer  # not at the top: the other benchmarks do without torchvision

    hidden = config.mlp_width or 4 * config.width
    shape = (config.image, config.patch, config.layers, config.heads, config.width, hidden)
    return VisionTransformer(*shape, num_classes=config.classes)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    config, batch = case.options["config"], case.options["batch"]
    generator = torch.Generator().manual_seed(BENCH_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BENCH_SEED)
        model = ViT(config)
        nn.init.normal_(
            model.heads.get_parameter("head.weight"), std=0.02
        )  # zero at first: then there would be no gradients to compare
    images = torch.randn(batch, config.channels, config.image, config.image, generator=generator).to(device)
    labels = torch.randint(config.classes, (batch,), generator=generator).to(device)
    return Inputs(model.to(device).state_dict(), images, labels)


def loss_and_gradients(model: nn.Module, loss_fn: Callable, inputs: Inputs, images: Tensor, dtype: str) -> Tensor:
    model.zero_grad(set_to_none=True)
    with autocast(dtype, images.device):
        loss = loss_fn(model(images), inputs.labels)
    loss.backward()
    return loss.detach()


def results_of(model: nn.Module, loss_fn: Callable, inputs: Inputs, images: Tensor, dtype: str) -> Results:
    found = {"output loss": loss_and_gradients(model, loss_fn, inputs, images, dtype)}
    return found | {f"grad {name}": p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def builder(make: Callable[[ViTConfig], nn.Module], loss_fn: Callable, optimizer: Callable):
    def build(case: Case, inputs: Inputs, dtype: str) -> StepTask:
        model = make(case.options["config"]).to(inputs.images.device)
        model.load_state_dict(inputs.weights)
        updates = optimizer(model.parameters(), lr=LR)

        def step() -> None:
            loss_and_gradients(model, loss_fn, inputs, inputs.images, dtype)
            updates.step()

        return StepTask(step, lambda: results_of(model, loss_fn, inputs, inputs.images, dtype))

    return build


def exact(case: Case, inputs: Inputs) -> Results:
    model = plain(case.options["config"]).to(inputs.images.device)
    model.load_state_dict(inputs.weights)
    return results_of(model.double(), nn.functional.cross_entropy, inputs, inputs.images.double(), "fp64")


def flops(case: Case, inputs: Inputs) -> float:
    """6 for each weight of a product and token, and 12 for each product of attention."""
    config: ViTConfig = case.options["config"]
    hidden = config.mlp_width or 4 * config.width
    weights = config.layers * config.width * (4 * config.width + 2 * hidden)
    patches = config.width * config.channels * config.patch**2
    attention = 12.0 * config.layers * config.width * config.tokens
    return len(inputs.images) * config.tokens * (6.0 * (weights + patches) + attention)


def case(name: str, batch: int, config: dict[str, Any], **how: Any) -> Case:
    return Case(f"{name}, batch {batch}", options={"config": ViTConfig(**config), "batch": batch}, **how)


B_16 = {"image": 64, "patch": 16, "layers": 12, "heads": 12, "width": 768}

BENCHMARK = StepBenchmark(
    name="vit",
    unit="FLOP",
    builders={
        "bigmodel_fast": builder(ViT, ops.cross_entropy, optim.AdamW),
        "eager": builder(plain, nn.functional.cross_entropy, torch.optim.AdamW),
    },
    make_inputs=make_inputs,
    make_exact=exact,
    count=flops,
    cases=(
        case("vit_b_16 at 64x64", 32, B_16, quick=True),
        case("192 wide, 6 layers, 32x32", 64, {}),
    ),
    cuda_cases=(case("vit_b_16", 128, {**B_16, "image": 224}, dtypes=("bf16",), quick=True),),
    tiny=case("tiny", 2, {"image": 8, "layers": 2, "heads": 2, "width": 16}),
)

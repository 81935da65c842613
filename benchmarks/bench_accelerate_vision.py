"""A training step of models that see and hear, as they are and after bmf.accelerate: forward, loss, backward, AdamW.

Models of transformers and torchvision with random weights, in the shapes people train; the step is the one of any loop,
with dropout and stochastic depth at work. All providers start from the same weights and see the same batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import bigmodel_fast as bmf

from .bench_accelerate import gradients_by_layer
from .cases import BENCH_SEED, Case, Results, StepBenchmark, StepTask, autocast

LR, CLASSES = 2e-5, 10

Batch = dict[str, Tensor]


@dataclass
class Inputs:
    weights: dict[str, Tensor]
    batch: Batch


def make_model(case: Case, device: torch.device) -> nn.Module:
    name, config = case.options["model"], case.options["config"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(BENCH_SEED)
        if name.islower():
            import torchvision

            model = torchvision.models.get_model(name, num_classes=CLASSES, **config)
            for head in [m for n, m in model.named_modules() if n in ("heads.head", "head")]:
                nn.init.normal_(head.weight, std=0.02)  # zero at first: then there would be no gradients to compare
            return model.to(device)
        import transformers

        cls = getattr(transformers, name)
        return cls(cls.config_class(**config)).to(device)


def make_inputs(case: Case, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(BENCH_SEED)
    batch = {}
    for name, (shape, high) in case.options["inputs"].items():
        drawn = torch.rand(shape, generator=generator, device=device)
        batch[name] = 3.4 * (drawn - 0.5) if high is None else (drawn * high).long()
    return Inputs(make_model(case, device).state_dict(), batch)


def loss_and_gradients(model: nn.Module, batch: Batch, dtype: str) -> Tensor:
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    with autocast(dtype, device):
        if "images" in batch:
            loss = nn.functional.cross_entropy(model(batch["images"]), batch["labels"])
        else:
            more = {} if "labels" in batch else {"return_loss": True}
            loss = model(**batch, **more).loss
    loss.backward()
    return loss.detach()


def results_of(model: nn.Module, batch: Batch, dtype: str) -> Results:
    return {"output loss": loss_and_gradients(model, batch, dtype).float(), **gradients_by_layer(model)}


def builder(prepare: Callable[[nn.Module], Any]) -> Callable[[Case, Inputs, str], StepTask]:
    def build(case: Case, inputs: Inputs, dtype: str) -> StepTask:
        model = make_model(case, next(iter(inputs.batch.values())).device)
        model.load_state_dict(inputs.weights)
        prepare(model)
        updates = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)

        def step() -> None:
            loss_and_gradients(model.train(), inputs.batch, dtype)
            updates.step()
            updates.zero_grad()

        # Random numbers cannot be compared, so results are checked without dropout.
        return StepTask(step, lambda: results_of(model.eval(), inputs.batch, dtype))

    return build


def exact(case: Case, inputs: Inputs) -> Results:
    model = make_model(case, next(iter(inputs.batch.values())).device)
    model.load_state_dict(inputs.weights)
    batch = {name: t.double() if t.is_floating_point() else t for name, t in inputs.batch.items()}
    return results_of(model.double().eval(), batch, "fp64")


def flops(case: Case, inputs: Inputs) -> float:
    """What torch counts in products, convolutions and attention of a step."""
    model = make_model(case, next(iter(inputs.batch.values())).device).eval()
    with FlopCounterMode(display=False) as counter:
        loss_and_gradients(model, inputs.batch, "bf16")
    return float(counter.get_total_flops())


def case(name: str, model: str, config: dict[str, Any], inputs: dict[str, Any], **how: Any) -> Case:
    """inputs: by name (shape, how many whole numbers to draw from, or None for others of mean 0 and variance 1)."""
    options = {"model": model, "config": config, "inputs": inputs}
    return Case(name, options=options, **{"dtypes": ("bf16",), "quick": True, **how})


def pictures(batch: int, size: int, name: str = "images") -> dict[str, Any]:
    return {name: ((batch, 3, size, size), None), "labels": ((batch,), CLASSES)}


def texts_and_pictures(batch: int, length: int, size: int) -> dict[str, Any]:
    return {"input_ids": ((batch, length), 49000), "pixel_values": ((batch, 3, size, size), None)}


VIT = {"image_size": 64, "num_labels": CLASSES}
WHISPER = {  # tiny
    "d_model": 384, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 6,
    "decoder_attention_heads": 6, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536,
}  # fmt: skip
WAV2VEC2 = {"layerdrop": 0.0, "apply_spec_augment": False, "num_labels": CLASSES}
SPEECH = {"input_features": ((2, 80, 3000), None), "labels": ((2, 64), 50000)}
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}

BENCHMARK = StepBenchmark(
    name="accelerate_vision",
    requires="transformers",
    unit="FLOP",
    builders={"bigmodel_fast": builder(bmf.accelerate), "eager": builder(lambda model: None)},
    make_inputs=make_inputs,
    make_exact=exact,
    count=flops,
    cases=(
        case("ViT-B/16, 32 x 64x64", "ViTForImageClassification", VIT, pictures(32, 64, "pixel_values")),
        case("torchvision vit_b_16, 32 x 64x64", "vit_b_16", {"image_size": 64}, pictures(32, 64)),
        case("torchvision swin_t, 4 x 224x224", "swin_t", {}, pictures(4, 224)),
        case("CLIP ViT-B/32, 8 x 77 tokens and 224x224", "CLIPModel", {}, texts_and_pictures(8, 77, 224)),
        case("Whisper tiny, 2 x 30 s and 64 tokens", "WhisperForConditionalGeneration", WHISPER, SPEECH),
        case(
            "wav2vec2 base, 2 x 5 s",
            "Wav2Vec2ForSequenceClassification",
            WAV2VEC2,
            {"input_values": ((2, 80000), None), "labels": ((2,), CLASSES)},
        ),
    ),
    cuda_cases=(
        case(
            "ViT-B/16, 128 x 224x224",
            "ViTForImageClassification",
            {**VIT, "image_size": 224},
            pictures(128, 224, "pixel_values"),
        ),
    ),
    tiny=case(
        "tiny",
        "ViTForImageClassification",
        {**VIT, **TINY, "image_size": 16, "patch_size": 8},
        pictures(2, 16, "pixel_values"),
        dtypes=("bf16", "fp32"),
    ),
)

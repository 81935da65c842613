"""GPT and ViT: a layer from one norm to the next is one function to autograd, unless someone watches a part of it."""

import pytest
import torch
from torch import Tensor

import bigmodel_fast as bmf
from bigmodel_fast import _dispatch, nn
from bigmodel_fast.models import GPT, GPTConfig, ViT, ViTConfig

NAMES = ("gpt2", "modern", "vit")


def make_model(name: str) -> tuple[torch.nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "vit":
        return ViT(ViTConfig(image=8, layers=2, heads=2, width=32)), torch.randn(2, 3, 8, 8)
    config = GPTConfig(70, 16, layers=2, heads=4, width=32, kv_heads=2 if name == "modern" else None, layout=name)  # type: ignore[arg-type]
    return GPT(config), torch.randint(70, (2, 16))


def operators(model: torch.nn.Module, x: Tensor) -> set[str]:
    bmf.explain(reset=True)
    model(x)
    return {c.op for c in bmf.explain(reset=True).calls}


@pytest.mark.parametrize("name", NAMES)
def test_models_use_it(name: str) -> None:
    model, x = make_model(name)
    if name == "vit":
        torch.nn.init.normal_(model.heads[0].weight)  # type: ignore[index, arg-type]
    plain, found = model(x), operators(model, x)
    assert "pre_norm_layer" in found
    assert not found & {"attention", "mlp", "gated_mlp"}
    with _dispatch.forcing("reference"):
        torch.testing.assert_close(model(x), plain)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def attention_of(block) -> torch.nn.Module:
    return block.self_attention if hasattr(block, "self_attention") else block.attention


def touched(case: str, model, block, norm_after) -> None:
    if case == "hooks of attention":
        attention_of(block).register_forward_hook(lambda *_: None)
    elif case == "hooks of the norm within":
        (block.ln_2 if hasattr(block, "ln_2") else block.norm2).register_forward_hook(lambda *_: None)
    elif case == "hooks of the norm after":
        norm_after.register_forward_pre_hook(lambda *_: None)
    elif case == "backward hooks of the MLP":
        block.mlp.register_full_backward_hook(lambda *_: None)
    elif case == "a compiled MLP":
        block.mlp.compile(backend="eager")
    elif case == "another forward":
        block.mlp.forward = block.mlp.forward
    elif case == "another norm":
        norm_after.__class__ = type("Other", (type(norm_after),), {})
    elif case == "a parameter of another class":
        weight = attention_of(block).out.weight if hasattr(block, "attention") else attention_of(block).out_proj.weight
        weight.__class__ = type("Other", (torch.nn.Parameter,), {})


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "case",
    [
        "hooks of attention",
        "hooks of the norm within",
        "hooks of the norm after",
        "backward hooks of the MLP",
        "a compiled MLP",
        "another forward",
        "another norm",
        "a parameter of another class",
    ],
)
def test_a_touched_part_is_called(name: str, case: str) -> None:
    model, x = make_model(name)
    expected = model(x)
    if name == "vit":
        block, norm_after = model.encoder.layers[-1], model.encoder.ln  # type: ignore[union-attr, index]
    else:
        block, norm_after = model.blocks[-1], model.norm  # type: ignore[index]
    touched(case, model, block, norm_after)
    assert {"pre_norm_layer", "attention"} <= operators(model, x)  # the other layer is as before
    torch.testing.assert_close(model(x), expected)


class Twice(torch.nn.Module):
    def forward(self, x: Tensor, *_) -> Tensor:
        return x + x


PARTS = [("gpt2", "attention"), ("modern", "mlp"), ("vit", "self_attention"), ("vit", "mlp"), ("vit", "dropout")]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_replaced_part_is_called(name: str, part: str) -> None:
    """Whatever it lacks of what the part before it had."""
    model, x = make_model(name)
    if name == "vit":
        torch.nn.init.normal_(model.heads[0].weight)  # type: ignore[index, arg-type]
    plain = model(x)
    for block in model.encoder.layers if name == "vit" else model.blocks:  # type: ignore[union-attr]
        setattr(block, part, Twice())
    assert "pre_norm_layer" not in operators(model, x)
    assert not torch.allclose(model(x), plain)


def test_global_hooks_see_every_part() -> None:
    model, x = make_model("gpt2")
    seen: set[str] = set()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda m, *_: seen.add(type(m).__name__))
    try:
        model(x)
    finally:
        hook.remove()
    assert {"SelfAttention", "MLP", "LayerNorm", "Linear"} <= seen


def test_dense_layers_with_an_activation() -> None:
    model, x = make_model("gpt2")
    plain = model(x)
    for block in model.blocks:  # type: ignore[union-attr]
        block.attention.qkv.activation = "relu"
    assert "pre_norm_layer" not in operators(model, x)
    assert not torch.allclose(model(x), plain)


def test_an_rms_norm_without_eps_takes_that_of_its_input() -> None:
    model, x = make_model("modern")
    model.norm.eps = None  # type: ignore[union-attr]
    assert {"pre_norm_layer", "rms_norm"} <= operators(model, x)


def test_vit_with_dropout() -> None:
    model, x = make_model("vit")
    for block in model.encoder.layers:  # type: ignore[union-attr]
        block.dropout.p = 0.5
    assert "pre_norm_layer" not in operators(model, x)
    assert "pre_norm_layer" in operators(model.eval(), x)


def test_a_layer_norm_without_bias_is_none_of_the_other_kind() -> None:
    model, x = make_model("gpt2")
    for block in model.blocks:  # type: ignore[union-attr]
        block.norm2 = nn.LayerNorm(32, bias=False)
    found, grad = model(x), torch.autograd.grad(model(x).sum(), model.blocks[0].norm2.weight)  # type: ignore[index]
    assert "pre_norm_layer" in operators(model, x)
    with _dispatch.forcing("reference"):
        torch.testing.assert_close(found, model(x))
        torch.testing.assert_close(grad, torch.autograd.grad(model(x).sum(), model.blocks[0].norm2.weight))  # type: ignore[index]


def test_a_cache_and_torch_func() -> None:
    """Generation and functorch's transforms get the operators one by one."""
    model, x = make_model("gpt2")
    bmf.explain(reset=True)
    model.generate(x[:, :4], 3, temperature=0)  # type: ignore[operator]
    assert "pre_norm_layer" not in {c.op for c in bmf.explain(reset=True).calls}
    parameters = dict(model.named_parameters())
    found = torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).cos().sum())(parameters)
    assert "pre_norm_layer" not in {c.op for c in bmf.explain(reset=True).calls}
    expected = torch.autograd.grad(model(x).cos().sum(), list(parameters.values()))
    torch.testing.assert_close(tuple(found.values()), expected)

"""Our models with other modules in the place of their parts: adapters by peft, a user's own, and hooks on them."""

import copy
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn

import bigmodel_fast as bmf
from bigmodel_fast.models import (
    BERT,
    GPT,
    MLP,
    BERTConfig,
    GPTConfig,
    Transformer,
    TransformerConfig,
    ViT,
    ViTConfig,
    pack,
    translate,
)
from bigmodel_fast.models.layers import EncoderLayer, LayerShape
from bigmodel_fast.models.mlp import dense_layers
from bigmodel_fast.nn import parts

VOCABULARY, WIDTH = 60, 32
Model = Callable[[], nn.Module]
Call = Callable[[nn.Module], Tensor]

TOKENS = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
HIDDEN = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1))
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
SOURCE, TARGET = pack([[1, 2, 3], [4, 5]]), pack([[1, 2], [4, 5, 6]])


def gpt(layout: str, **how) -> GPT:
    return GPT(GPTConfig(VOCABULARY, 16, layers=2, heads=4, width=WIDTH, layout=layout, **how))  # type: ignore[arg-type]


def bert() -> BERT:
    return BERT(BERTConfig(VOCABULARY, 16, layers=2, heads=4, width=WIDTH))


def transformer(norm_first: bool) -> Transformer:
    return Transformer(TransformerConfig(VOCABULARY, 16, 2, 4, WIDTH, norm_first=norm_first))


def encoder_layer(norm_first: bool) -> EncoderLayer:
    return EncoderLayer(LayerShape(WIDTH, 4, 48, norm_first=norm_first))


def translated(model: nn.Module) -> Tensor:
    return torch.tensor([found.score for found in translate(model, *SOURCE, end=0, max_new_tokens=4)])  # type: ignore[arg-type]


CASES: dict[str, tuple[Model, Call]] = {
    "gpt2": (lambda: gpt("gpt2"), lambda m: m(TOKENS)),
    "gpt2 loss": (lambda: gpt("gpt2"), lambda m: m(TOKENS, TOKENS)),
    "gpt2 cache": (lambda: gpt("gpt2"), lambda m: m.hidden(TOKENS, m.new_cache(2))),  # type: ignore[operator]
    "modern": (lambda: gpt("modern", kv_heads=2), lambda m: m(TOKENS)),
    "vit": (lambda: ViT(ViTConfig(image=8, layers=2, heads=2, width=WIDTH)), lambda m: m(IMAGES)),
    "bert": (bert, lambda m: m(TOKENS)),
    "bert loss": (bert, lambda m: m(TOKENS, targets=TOKENS, segments=TOKENS % 2, lengths=torch.tensor([5, 8]))),
    "transformer": (lambda: transformer(False), lambda m: m(*SOURCE, *TARGET)),
    "transformer loss": (lambda: transformer(True), lambda m: m(*SOURCE, *TARGET, TARGET[0])),
    "translate": (lambda: transformer(False), translated),
    "encoder layer": (lambda: encoder_layer(False), lambda m: m(HIDDEN)),
    "encoder layer, norms first": (lambda: encoder_layer(True), lambda m: m(HIDDEN)),
    "mlp": (lambda: MLP([WIDTH, 16, 24, 4], dropout=0.1), lambda m: m(HIDDEN.flatten(0, 1))),
    "gated mlp": (lambda: bmf.nn.GatedMLP(WIDTH, 48), lambda m: m(HIDDEN)),
}
WITHOUT_GRADIENT = ("translate",)


def example(case: str) -> tuple[nn.Module, Call]:
    """A model in evaluation mode, with nothing left at zero, and what is called."""
    make, call = CASES[case]
    torch.manual_seed(0)
    model = make().eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.1)
    return model, call


def leaves(model: nn.Module) -> list[str]:
    """Names of the modules that hold parameters of their own and nothing else."""
    return [name for name, m in model.named_modules() if m._parameters and not m._modules]


def replace(model: nn.Module, name: str, make: Callable[[nn.Module], nn.Module]) -> None:
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)._modules[last] = make(model.get_submodule(name))


# ---- adapters ----


def adapted(model: nn.Module) -> nn.Module:
    """With LoRA at every dense layer, embedding and convolution, none of it zero."""
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(model)
    kinds = (nn.Linear, nn.Embedding, nn.Conv2d)
    names = [name for name, m in model.named_modules() if isinstance(m, kinds)]
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=names, init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, model).eval()
    assert sum(hasattr(m, "lora_A") for m in model.modules()) == len(names)
    return model


def low_rank(layer) -> tuple[Tensor, Tensor, float, bool]:
    """A [r, in], B [out, r], their scale, and whether the weight is [in, out]."""
    if layer.lora_embedding_A:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"], layer.scaling["default"], True
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"], False


def merged(model: nn.Module) -> nn.Module:
    """The same function without adapters: W + scale B A for W."""
    model = copy.deepcopy(model)
    for name, layer in [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A")]:
        a, b, scale, turned = low_rank(layer)
        weight, added = layer.base_layer.weight, scale * b.flatten(1) @ a.flatten(1)
        weight.data += (added.t() if turned else added).detach().view_as(weight)
        replace(model, name, lambda layer: layer.base_layer)
    return model.requires_grad_()


@pytest.mark.parametrize("case", CASES)
def test_lora_is_what_its_merged_model_is(case: str) -> None:
    """Outputs, and the gradients that the chain rule makes of the merged weights': scale dW A^T, scale B^T dW."""
    model, call = example(case)
    lora = adapted(model)
    plain = merged(lora)
    found, expected = call(lora), call(plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, call(model), rtol=1e-2, atol=1e-2)
    if case in WITHOUT_GRADIENT:
        return
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, layer in [(n, m) for n, m in lora.named_modules() if hasattr(m, "lora_A")]:
        a, b, scale, turned = low_rank(layer)
        dw = plain.get_submodule(name).weight.grad
        dw = dw.t() if turned else dw.flatten(1)
        for p, grad in ((b, scale * dw @ a.flatten(1).t()), (a, scale * b.flatten(1).t() @ dw)):
            assert p.grad is not None, name
            torch.testing.assert_close(
                p.grad.flatten(1),
                grad,
                rtol=1e-3,
                atol=1e-4 * float(grad.detach().abs().max()),
                msg=lambda m, n=name: f"{n}: {m}",
            )


def test_generation_with_adapters_is_that_of_the_merged_model() -> None:
    lora = adapted(example("gpt2")[0])
    tokens = TOKENS[:, :3]
    assert torch.equal(
        lora.generate(tokens, 8, temperature=0),  # type: ignore[operator]
        merged(lora).generate(tokens, 8, temperature=0),  # type: ignore[operator]
    )


# ---- hooks and other modules ----


@pytest.mark.parametrize("case", CASES)
def test_every_part_may_have_a_hook(case: str) -> None:
    """It is called; one that changes the output of its part changes the model's."""
    model, call = example(case)
    expected, seen = call(model), set()
    for name in leaves(model):
        hooked = copy.deepcopy(model)
        hooked.get_submodule(name).register_forward_hook(lambda m, x, y, name=name: seen.add(name))
        torch.testing.assert_close(call(hooked), expected, rtol=1e-4, atol=1e-4)
        assert name in seen
        hooked.get_submodule(name).register_forward_hook(changed)
        assert not torch.allclose(call(hooked), expected, rtol=1e-4, atol=1e-4), name


def changed(_: nn.Module, x: tuple, y):
    if isinstance(y, tuple):
        return changed(_, x, y[0]), *y[1:]
    return y * 1.5 + torch.linspace(-1, 1, y.shape[-1])


class Opaque(nn.Module):
    """Does what another module does, and lets nobody see its weights."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self._forward = inner.forward

    def forward(self, *inputs):
        return self._forward(*inputs)


@pytest.mark.parametrize("case", CASES)
def test_a_part_need_not_have_weights(case: str) -> None:
    model, call = example(case)
    expected = call(model)
    for name in leaves(model):
        if not isinstance(model.get_submodule(name), bmf.nn.LayerNorm):  # a cache has the dtype of some parameter
            replace(model, name, Opaque)
    torch.testing.assert_close(call(model), expected, rtol=1e-4, atol=1e-4)


def test_a_part_is_called_with_dropout_and_residual_around_it() -> None:
    """The same choices as within the operator."""
    torch.manual_seed(0)
    layer = EncoderLayer(LayerShape(WIDTH, 4, 48, norm_first=True, dropout=0.5))
    torch.manual_seed(1)
    expected = layer(HIDDEN)
    assert not torch.allclose(layer(HIDDEN), expected)
    for name in leaves(layer):
        replace(layer, name, Opaque)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(HIDDEN), expected)


def test_torch_compile_calls_them_too() -> None:
    model, call = example("gpt2")
    plain = call(model)
    model.blocks[1].mlp.up.register_forward_hook(changed)  # type: ignore[index, union-attr, operator]
    try:
        found = torch.compile(model, backend="aot_eager", fullgraph=True)(TOKENS)
    finally:
        torch._dynamo.reset()
    torch.testing.assert_close(found, call(model), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, rtol=1e-2, atol=1e-2)


# ---- what is plain ----


def test_dense_layers_that_do_more_are_called() -> None:
    x, up, down = HIDDEN, bmf.nn.Linear(WIDTH, 48, activation="relu"), nn.Linear(48, WIDTH)
    assert not parts.plain(up, down)
    torch.testing.assert_close(parts.mlp(x, up, down, activation="tanh"), down(up(x).tanh()))
    mlp = bmf.nn.GatedMLP(WIDTH, 48)
    mlp.up = nn.Linear(WIDTH, 48)
    torch.testing.assert_close(mlp(x), mlp.down(nn.functional.silu(mlp.gate(x)) * mlp.up(x)))
    model, _ = example("modern")
    model.blocks[0].mlp.up = nn.Linear(WIDTH, model.config.hidden)  # type: ignore[index, union-attr]
    expected = copy.deepcopy(model)
    for name in leaves(expected):
        replace(expected, name, Opaque)
    torch.testing.assert_close(model(TOKENS), expected(TOKENS), rtol=1e-4, atol=1e-4)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class AddOne(nn.Identity):
    def forward(self, x):
        return x + 1


def dense(*more: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *more)


def test_an_mlp_calls_what_is_more_than_a_row_of_layers() -> None:
    seen: list[nn.Module] = []
    hooked = dense()
    hooked.register_forward_hook(lambda m, *_: seen.append(m))
    for part in (Residual(*dense()), hooked, AddOne(), dense(Residual(*dense()))):
        model, x = MLP([WIDTH, WIDTH, 4]), torch.randn(3, WIDTH)
        model[1] = part
        seen.clear()
        torch.testing.assert_close(model(x), nn.Sequential.forward(model, x))
        assert len(seen) == (2 if part is hooked else 0)
        with pytest.raises(ValueError, match="an MLP "):
            dense_layers(model)


def test_modules_that_come_again_in_an_mlp() -> None:
    relu, linear = nn.ReLU(), nn.Linear(WIDTH, WIDTH)
    layers = dense_layers(nn.Sequential(nn.Linear(4, WIDTH), relu, linear, relu))
    assert [layer.activation for layer in layers] == ["relu", "relu"]
    with pytest.raises(ValueError, match="each Linear once, got one again at 2"):
        dense_layers(nn.Sequential(linear, relu, linear))


def test_vits_mlp_calls_what_stands_between_its_dense_layers() -> None:
    model, call = example("vit")
    expected, mlp = call(model), cast(ViT, model).encoder.layers[0].mlp
    for part in (nn.GELU("tanh"), nn.ReLU()):
        mlp[1] = part
        assert not torch.equal(call(model), expected)
    mlp[1], mlp[2] = nn.GELU(), nn.Dropout(0.5).train()
    assert not torch.equal(call(model), expected)


def test_an_embedding_that_looks_up_in_its_own_way_is_tied_by_what_it_gives() -> None:
    model, call = example("gpt2")
    expected = call(model)
    model.embedding.__class__ = Doubled  # type: ignore[union-attr]
    halved = copy.deepcopy(model)
    with torch.no_grad():
        halved.embedding.weight *= 0.5  # type: ignore[union-attr, operator]
    torch.testing.assert_close(call(halved), expected, rtol=1e-4, atol=1e-4)


class Doubled(nn.Embedding):
    def forward(self, tokens):
        return 2 * super().forward(tokens)


def test_an_embedding_keeps_its_options() -> None:
    table = nn.Embedding(VOCABULARY, WIDTH, padding_idx=3)
    parts.embedding(torch.tensor([3, 4]), table).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad[[3, 4], 0].tolist() == [0.0, 1.0]


def test_a_hook_on_a_tied_embedding_sees_the_tokens_alone() -> None:
    """NEFTune's adds noise to them: the output layer has none."""
    model, call = example("gpt2")
    seen: list[torch.Size] = []
    model.embedding.register_forward_hook(lambda m, x, y: seen.append(x[0].shape))  # type: ignore[union-attr, operator]
    call(model)
    assert seen == [TOKENS.shape]


def test_the_native_trainer_takes_no_layers_that_would_have_to_be_called() -> None:
    model = MLP([4, 8, 2])
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="no hooks and no forward of its own, got a Linear with one at 0"):
        bmf.train.MLPTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    model = MLP([4, 8, 2])
    model[2] = bmf.nn.Linear(8, 2, activation="relu")
    with pytest.raises(ValueError, match="got Linear at 2"):
        bmf.train.MLPTrainer(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))

"""Runs a model stock, accelerated and in float64, and compares outputs, loss and gradients."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numerics
import torch
from torch import Tensor, nn

import bigmodel_fast as bmf

Call = Callable[[nn.Module], tuple[dict[str, Tensor], Tensor]]  # outputs by name, and what is differentiated
DTYPES = ("fp32", "bf16")
B, S, E, H = 2, 7, 24, 3  # batch, tokens, width, heads


def run(model: nn.Module, call: Call, dtype: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext():
        outputs, scalar = call(model)
    scalar.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach() for name, t in outputs.items()}, gradients


def _block(name: str) -> str:
    """The module around a parameter's own: a query's gradient is a difference of terms as large as the value's."""
    return name.rpartition(".")[0].rpartition(".")[0]


def assert_same_model(model: nn.Module, call: Call, dtype: str, **options: bool):
    """The accelerated model is as near to float64 as the stock one. Returns the report and the accelerated model."""
    stock, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fast = copy.deepcopy(model)
    report = bmf.accelerate(fast, **options)
    assert list(fast.state_dict()) == list(model.state_dict())
    found, eager, true = run(fast, call, dtype), run(stock, call, dtype), run(exact, call, "fp64")
    assert found[0].keys() == eager[0].keys()
    for name in found[0]:
        made, stocks = found[0][name], eager[0][name]
        if dtype == "bf16" and made.dim() == 0:  # a loss, of logits computed in it
            made, stocks = made.bfloat16(), stocks.bfloat16()
        numerics.assert_close(made, stocks, true[0][name], numerics.FORWARD, f"output {name}")
    assert found[1].keys() == eager[1].keys()
    scale = max(numerics.largest(g) for g in true[1].values())
    for name, grad in found[1].items():
        made, stocks, limit = grad, eager[1][name], scale
        if dtype == "bf16":  # computed in it, though a parameter's gradient is float32
            made, stocks = made.bfloat16(), stocks.bfloat16()
            limit = max(numerics.largest(g) for other, g in true[1].items() if _block(other) == _block(name))
        numerics.assert_close(made, stocks, true[1][name], numerics.BACKWARD, f"gradient of {name}", limit)
    return report, fast


def assert_same_training(model: nn.Module, calls: list[Call], steps: int = 32):
    """The losses of AdamW's steps stay as near to those in float64 as the stock model's, and fall."""

    def losses(trained: nn.Module) -> Tensor:
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3, eps=1e-3)
        found = []
        for step in range(steps):
            loss = calls[step % len(calls)](trained)[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.detach())
        return torch.stack(found)

    fast = copy.deepcopy(model)
    bmf.accelerate(fast)
    exact, stock = losses(copy.deepcopy(model).double()), losses(copy.deepcopy(model))
    assert exact[-len(calls) :].mean() < exact[: len(calls)].mean() - 0.1
    numerics.assert_close(losses(fast), stock, exact, numerics.BACKWARD, "losses")


def weighed(y: Tensor) -> Tensor:
    """A loss in which every element has a weight of its own."""
    return (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)).sum()


def kinds(report, accelerated: bool = True) -> set[str]:
    return {row.kind for row in (report.accelerated if accelerated else report.left)}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def seeded(make, *args, **options) -> nn.Module:
    torch.manual_seed(0)
    model = make(*args, **options)
    for p in model.parameters():
        if p.dim() < 2:  # not the ones and zeros of a new model
            nn.init.normal_(p, 0.5, 0.2)
    return model


def as_float64(model: nn.Module, *tensors: Tensor) -> list[Tensor]:
    dtype = next(model.parameters()).dtype
    return [t.to(dtype) if t.is_floating_point() else t for t in tensors]


def outputs_of(*inputs: Tensor, **options):
    def call(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        keywords = dict(zip(options, as_float64(model, *options.values()), strict=True))
        y = model(*as_float64(model, *inputs), **keywords)
        y = y[0] if isinstance(y, tuple) else y
        return {"y": y}, weighed(y)

    return call


def loss_of(**given: Any) -> Call:
    """The loss of a model of transformers, and the logits of those that classify whole sequences."""

    def call(model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
        out = model(**given)
        assert out.loss.isfinite()
        found = {"loss": out.loss}
        if "logits" in out and out.logits.dim() == 2:
            found["logits"] = out.logits
        return found, out.loss

    return call


def explained() -> set[tuple[str, str]]:
    """(operator, reason) of the calls since the last time."""
    return {(c.op, c.reason) for c in bmf.explain(reset=True).calls}


def ops_used() -> set[str]:
    return {op for op, _ in explained()}


def packs(ops: set[str]) -> bool:
    """Whether a batch went without padding."""
    return any(op.endswith("_varlen") for op in ops)

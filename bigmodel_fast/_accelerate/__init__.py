"""accelerate: our operators in a model that someone else wrote; restore: the model as it was.

`swap.py` says how one module is replaced, `layers.py`, `transformer.py`, `hugging_face.py` and a file for each other
family hold the recipes. A recipe recognises modules by their forward or by what it computes (`probe.py`), never by a
name alone. See docs/accelerate.md.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import _dispatch
from . import (
    distilbert,
    encoder_decoder,
    hugging_face,
    interface,
    layers,
    modernbert,
    projected,
    self_attention,
    swap,
    swin,
    t5,
    transformer,
)
from . import unpad as unpadding

AREAS = ("attention", "mlp", "norm", "loss", "rotary", "unpad")
_SWITCHED_OFF = tuple(f"{area}=False" for area in AREAS)
RECIPES: tuple[type[swap.Fast], ...] = (
    transformer.FastEncoderLayer,
    transformer.FastDecoderLayer,
    transformer.FastMultiheadAttention,
    layers.FastLayerNorm,
    layers.FastNorm,
    *distilbert.RECIPES,
    *modernbert.RECIPES,
    *t5.RECIPES,
    *encoder_decoder.RECIPES,
    hugging_face.FastBertAttention,
    hugging_face.FastBertOutput,
    hugging_face.FastBertLayer,
    hugging_face.FastBertMLP,
    unpadding.FastHead,
    unpadding.FastEncoderModel,
    unpadding.FastEncoder,
    unpadding.FastAttentionBlock,
    hugging_face.FastLlamaAttention,
    hugging_face.FastLanguageModel,
    projected.FastProjectedAttention,
    self_attention.FastSelfAttention,
    swin.FastShiftedWindowAttention,
    layers.FastMLP,
    layers.FastLinear,
    layers.FastEmbedding,
    layers.FastDropout,
)


@dataclass(frozen=True)
class Row:
    """One module: its name in the model, its class, whether it is accelerated, by which recipe or why not."""

    name: str
    kind: str
    accelerated: bool
    why: str


@dataclass(frozen=True)
class Report:
    """What accelerate() did; `str()` gives a table in which modules of one kind and fate share a line."""

    rows: tuple[Row, ...]

    @property
    def accelerated(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.accelerated)

    @property
    def left(self) -> tuple[Row, ...]:
        """Modules of a kind there is a recipe for, which were left alone."""
        return tuple(row for row in self.rows if not row.accelerated)

    @property
    def line(self) -> str:
        """How many modules of each class were replaced, and left, on one line."""
        counts = [Counter(row.kind for row in rows) for rows in (self.accelerated, self.left)]
        fast, left = (", ".join(f"{n} {kind}" for kind, n in count.items()) for count in counts)
        return f"accelerated: {fast or 'nothing'}" + (f"; left alone: {left}" if left else "")

    def __str__(self) -> str:
        groups: dict[tuple[bool, str, str], list[str]] = {}
        for row in self.rows:
            groups.setdefault((not row.accelerated, row.kind, row.why), []).append(row.name or "(the model)")
        if not groups:
            return "nothing in this model is of a kind that can be accelerated"
        table = [("", "class", "modules", "first", "how, or why not")]
        for (left, kind, why), names in sorted(groups.items(), key=lambda item: item[0][0]):
            table.append(("left" if left else "fast", kind, str(len(names)), names[0], why))
        widths = [max(len(line[i]) for line in table) for i in range(5)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table
        )


def accelerate(
    model: nn.Module,
    *,
    attention: bool = True,
    mlp: bool = True,
    norm: bool = True,
    loss: bool = True,
    rotary: bool = True,
    unpad: bool | str = "auto",
    strict: bool = False,
) -> Report:
    """Makes a model compute with our operators, in place: this instance, not its classes.

        report = bmf.accelerate(model)
        print(report)

    Parameters, buffers, hooks and state_dict keys stay as they are, so weights may be loaded before or after. A second
    call changes nothing. Modules that are not recognised stay as they are; those that cannot be replaced (quantised or
    sharded weights, adapters on a layer that would be fused, a forward of their own) do too, and the report says why.
    What speaks against a fused layer later on (hooks, adapters, weights asked for) is noticed at the call, which then
    goes to the original; `bmf.explain()` lists it.

    Args:
        model: any module; those of torch, transformers and torchvision are known best.
        attention: attention, and the Transformer layers of torch.
        mlp: dense layers, MLPs, embeddings, dropout.
        norm: LayerNorm and RMSNorm.
        loss: the output layer and the loss of language models in one, while training; `logits` is then None.
        rotary: rotary position embeddings.
        unpad: encoders work on tokens that are no padding, and in the last layer on those that are read. "auto": on
            CPU, where the head on top is known not to read the others; True: always, and outputs of padding are 0.
        strict: raise where something of a known kind was left alone, or nothing was found.

    Returns:
        What was done with each module.

    Raises:
        TypeError: model is no module.
        RuntimeError: with strict, before anything is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got a {type(model).__name__}")
    if unpad not in (True, False, "auto"):
        raise ValueError(f'accelerate: unpad must be True, False or "auto", got {unpad!r}')
    wanted = dict(zip(AREAS, (attention, mlp, norm, loss, rotary, unpad), strict=True))
    rows, found, interfaces = [], [], []
    for name, module in _outermost_pretrained(model):
        rows.append(_examine_interface(name, module, attention))
        interfaces += [module] if rows[-1].accelerated and not interface.enabled(module) else []
    with torch.random.fork_rng(devices=[]), _dispatch.unrecorded():  # what probes draw is not drawn from the loop
        if all_hooked := swap.all_hooked():  # probes would call them
            rows.append(Row("", type(model).__name__, False, f"{all_hooked}: remove them and call again"))
        for name, module in () if all_hooked else model.named_modules():
            row, recipe, how = _examine(name, module, wanted)
            rows += [row] if row else []
            if recipe is not None and row is not None and row.accelerated and not swap.is_fast(module):
                found.append((module, recipe, {**how, "wanted": wanted[recipe.area]}))
    self_attention.forget()
    report = Report(tuple(rows))
    if strict and not report.accelerated:
        raise RuntimeError("accelerate: nothing in the model is of a kind that can be accelerated")
    left = [row for row in report.left if row.why not in _SWITCHED_OFF]
    if strict and left:
        first = left[0]
        raise RuntimeError(
            f"accelerate: {len(left)} modules would be left alone, the first is {first.name or 'the model'} "
            f"({first.kind}): {first.why}; switch strict off to accelerate the others"
        )
    for module in interfaces:
        interface.enable(module)
    for module, recipe, how in found:
        swap.apply(module, recipe, how)
    return report


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`: every module of the model has its own class again. Returns the model.

    Raises:
        RuntimeError: the class or the forward of a module was changed by someone else since; nothing is undone then.
    """
    fast = [module for module in model.modules() if swap.is_fast(module)]
    for module in fast:
        swap.check_undo(module)
    for module in fast:
        swap.undo(module)
    interface.disable(model)
    return model


def _outermost_pretrained(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The models of transformers in a model that are not a part of another one."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        within = any(not outer or name.startswith(f"{outer}.") for outer, _ in found)
        if interface.is_pretrained(module) and not within:
            found.append((name, module))
    return found


def _examine_interface(name: str, module: nn.Module, wanted: bool) -> Row:
    kind = type(module).__name__
    if interface.enabled(module):
        return Row(name, kind, True, "already accelerated")
    reason = interface.refusal(module) if wanted else "attention=False"
    return Row(name, kind, reason is None, reason or "Attention through transformers' interface.")


def _examine(
    name: str, module: nn.Module, wanted: dict[str, Any]
) -> tuple[Row | None, type[swap.Fast] | None, dict[str, Any]]:
    """The first recipe that knows a module, and what becomes of it."""
    kind = type(module).__name__
    if swap.is_fast(module):
        return Row(name, kind, True, "already accelerated"), None, {}
    for recipe in RECIPES:
        how = recipe.match(module)
        if how is None:
            continue
        if not wanted[recipe.area]:
            return Row(name, kind, False, f"{recipe.area}=False"), recipe, {}
        if isinstance(how, str):
            return Row(name, kind, False, how), recipe, {}
        if reason := swap.unusual(module):
            return Row(name, kind, False, reason), recipe, {}
        return Row(name, kind, True, (recipe.__doc__ or recipe.__name__).partition("\n")[0]), recipe, how
    return None, None, {}

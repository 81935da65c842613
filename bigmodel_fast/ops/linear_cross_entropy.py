"""linear_cross_entropy: cross_entropy(x W^T + b, target) without ever holding [tokens, vocab] logits."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _checks, _dense
from ._autograd import apply
from .cross_entropy import cross_entropy
from .cross_entropy import reference as cross_entropy_reference
from .linear import linear
from .linear import reference as linear_reference


def reference(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    return_accuracy: bool = False,
):
    """Plain torch; holds the logits."""
    losses = partial(
        cross_entropy_reference,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        softcap=softcap,
        reduction=reduction,
    )
    return _of_logits(linear_reference(x, weight, bias), target, ignore_index, losses, return_accuracy)


def _of_logits(logits: Tensor, target: Tensor, ignore_index: int, losses: Callable[..., Tensor], accuracy: bool):
    loss = losses(logits, target)
    if not accuracy:
        return loss
    used = target != ignore_index
    logits, hit = logits.detach()[used], target[used]
    correct = logits.gather(1, hit[:, None])[:, 0] >= logits.amax(1)
    return loss, correct.to(torch.float32).mean()


def _empty_gradients(x, weight, wants):
    return (
        x.new_empty(x.shape[0] if wants[0] else 0, x.shape[1]),
        weight.new_empty(weight.shape[0] if wants[1] else 0, weight.shape[1], dtype=torch.float32),
        x.new_empty(weight.shape[0] if wants[2] else 0, dtype=torch.float32),
    )


@torch.library.register_fake("bigmodel_fast::linear_cross_entropy_fwd")
def _(x, weight, bias, target, ignore_index, label_smoothing, softcap, reduction, wants):
    loss = x.new_empty(target.shape if reduction == "none" else (), dtype=torch.float32)
    return loss, *_empty_gradients(x, weight, wants), loss.new_empty(())


@torch.library.register_fake("bigmodel_fast::linear_cross_entropy_bwd")
def _(dloss, x, weight, bias, target, ignore_index, label_smoothing, softcap, reduction, wants):
    return _empty_gradients(x, weight, wants)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients are made in forward, where the logits are, and only scaled in backward; but for reduction "none"."""

    @staticmethod
    def forward(x, weight, bias, target, wants, options):
        made = wants if options[-1] != "none" else (False, False, False)
        return torch.ops.bigmodel_fast.linear_cross_entropy_fwd(
            x, _dense.rows(weight), _dense.wide(bias), target, *options, made
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, target, ctx.wants, ctx.options = inputs
        _, *gradients, accuracy = output
        ctx.mark_non_differentiable(*gradients, accuracy)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, target, *gradients)
        ctx.gradients_free = ctx.options[-1] != "none"

    @staticmethod
    @once_differentiable
    def backward(ctx, dloss, *_):
        if dloss is None:
            return (None,) * 6
        x, weight, bias, target, *gradients = ctx.saved_tensors
        if not ctx.gradients_free:
            gradients = torch.ops.bigmodel_fast.linear_cross_entropy_bwd(
                dloss.contiguous(), x, _dense.rows(weight), _dense.wide(bias), target, *ctx.options, ctx.wants
            )
        elif torch.compiler.is_compiling():
            gradients = [g * dloss for g in gradients]
        else:
            # Handed out without a copy, as what autograd may keep for a parameter's .grad; a second backward through a
            # retained graph finds them taken, and makes its own.
            ctx.gradients_free = False
            if dloss.is_cuda:  # whose value nobody here waits for
                from ..kernels.linear_cross_entropy import scale_gradients

                scale_gradients(gradients, dloss)
            elif dloss.item() != 1.0:
                gradients = [g.detach().mul_(dloss) for g in gradients]
        dx, dweight, dbias = gradients
        return (
            dx if ctx.wants[0] else None,
            dweight.to(weight.dtype) if ctx.wants[1] else None,
            dbias.to(bias.dtype) if ctx.wants[2] else None,
            None,
            None,
            None,
        )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    return_accuracy: bool = False,
):
    """The output layer of a language model and its loss: cross_entropy(x W^T + b, target).

    Logits exist for a chunk of tokens at a time (about 100 MiB of them). With reduction "mean" and "sum" the gradients
    are made in the same pass, so that nothing is computed twice; with "none" backward computes the logits again.

    Args:
        x: [..., width], any strides; float32, bfloat16 or (by reference) another floating dtype.
        weight: [classes, width], torch's layout; may be float32 with a bfloat16 x.
        target: [...], int64, each in [0, classes) or ignore_index.
        bias: [classes] or None.
        ignore_index: tokens with this target have no loss and no gradient and do not count in the mean; on CPU they
            cost nothing.
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016).
        softcap: if given, logits become softcap * tanh(logits / softcap) first (Gemma 2).
        reduction: "mean" (over tokens that are not ignored; NaN if there are none), "sum" or "none".
        return_accuracy: also return the share of tokens, of those not ignored, whose target has the highest logit.

    Returns:
        The loss: float32 (float64 for float64 x); a scalar, or target's shape for "none". With `return_accuracy` a pair
        of it and a float32 scalar without gradient (NaN if no token counts), which costs nothing extra.

    Raises:
        TypeError: an argument is not floating point, or target is not int64.
        ValueError: shapes or devices do not fit together, or an option is out of range.
        IndexError: a target is out of range (on CPU, outside of torch.compile).
    """
    op = "linear_cross_entropy"
    _checks.floating(op, x=x, weight=weight, **_checks.given(bias=bias))
    _dense.check_input(op, x)
    _dense.check_weight(op, "weight", weight, None, x.shape[-1], "(x's last dimension)")
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: weight must have at least one class, got {_checks.describe(weight)}")
    _checks.shape(op, "bias", bias, (weight.shape[0],), "(one per row of weight)")
    _checks.loss_options(op, label_smoothing, softcap, reduction)
    _checks.targets(op, target, x, weight.shape[0], ignore_index)
    x, weight = _dense.operands(x, weight)
    reason = _dispatch.unsupported(x, weight, bias)
    few = None if reason else _dispatch.too_few(op, x, target.numel())
    reason = reason or few
    if not _dispatch.use_native(op, reason, x):
        # Of few tokens all logits are little, and their two operators write dW once and pack nothing.
        logits = (linear if few else linear_reference)(x, weight, bias)
        losses = partial(
            cross_entropy if few else cross_entropy_reference,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=softcap,
            reduction=reduction,
        )
        return _of_logits(logits, target, ignore_index, losses, return_accuracy)
    wants = tuple(_dense.needs_grad(t) for t in (x, weight, bias))
    options = (ignore_index, label_smoothing, softcap or 0.0, reduction)
    tokens = target.reshape(-1).contiguous()
    loss, *_, accuracy = apply(_LinearCrossEntropy, _dense.rows(x), weight, bias, tokens, wants, options)
    loss = loss.view(target.shape) if reduction == "none" else loss
    return (loss, accuracy) if return_accuracy else loss

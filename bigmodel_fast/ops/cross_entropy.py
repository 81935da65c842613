"""cross_entropy: -log softmax(logits)[target], averaged or summed over the targets that are not ignored."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _checks
from ._autograd import apply


def reference(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Plain torch, in float32 at least."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        target.reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    return loss.reshape(target.shape) if reduction == "none" else loss


def _plain(logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, reduction: str) -> Tensor:
    shaped = logits.dim() == 2 and target.dim() == 1 and target.dtype is torch.int64
    if not (shaped and logits.is_floating_point() and label_smoothing >= 0):
        raise TypeError("torch takes these too")
    if logits.dtype is not torch.float32:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(
        logits, target, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
    )


@torch.library.register_fake("bigmodel_fast::cross_entropy_fwd")
def _(logits, target, ignore_index, label_smoothing, softcap, reduction):
    loss = logits.new_empty(target.shape if reduction == "none" else (), dtype=torch.float32)
    return loss, logits.new_empty((target.numel(), 2), dtype=torch.float32)


@torch.library.register_fake("bigmodel_fast::cross_entropy_bwd")
def _(grad_loss, logits, target, lse, ignore_index, label_smoothing, softcap, reduction):
    return logits.new_empty(logits.shape)


class _CrossEntropy(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(logits, target, options):
        return torch.ops.bigmodel_fast.cross_entropy_fwd(logits, target, *options)

    @staticmethod
    def setup_context(ctx, inputs, output):
        logits, target, ctx.options = inputs
        _, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(logits, target, lse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        grad = torch.ops.bigmodel_fast.cross_entropy_bwd(grad_loss, *ctx.saved_tensors, *ctx.options)
        return grad, None, None


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of logits and class numbers.

    Args:
        logits: [..., classes], any strides.
        target: [...], int64, each in [0, classes) or ignore_index.
        ignore_index: rows with this target have no loss and no gradient, and do not count in the mean.
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016).
        softcap: if given, logits become softcap * tanh(logits / softcap) first.
        reduction: "mean" (over rows that are not ignored; NaN if there are none), "sum" or "none".

    Returns:
        float32 (float64 for float64 logits); a scalar, or target's shape for "none".

    Raises:
        TypeError: logits are not floating point, or target is not int64.
        ValueError: shapes or devices do not fit together, or an option is out of range.
        IndexError: a target is out of range (on CPU, outside of torch.compile).
    """
    if isinstance(logits, Tensor) and softcap is None:
        options = ignore_index, label_smoothing, reduction
        loss = _dispatch.small("cross_entropy", _plain, logits, logits.numel(), logits, target, *options)
        if loss is not None:
            return loss
    _checks.floating("cross_entropy", logits=logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"cross_entropy: logits must be [..., classes], got {_checks.describe(logits)}")
    _checks.loss_options("cross_entropy", label_smoothing, softcap, reduction)
    _checks.targets("cross_entropy", target, logits, logits.shape[-1], ignore_index)
    reason = _dispatch.unsupported(logits) or _dispatch.too_few("cross_entropy", logits, logits.numel())
    if not _dispatch.use_native("cross_entropy", reason, logits):
        return reference(
            logits,
            target,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=softcap,
            reduction=reduction,
        )
    return apply(_CrossEntropy, logits, target, (ignore_index, label_smoothing, softcap or 0.0, reduction))[0]

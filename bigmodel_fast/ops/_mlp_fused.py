"""A narrow MLP as a whole in one kernel: models.MLP on a GPU, in builds with CUDA C++ kernels that BMF_BACKEND=native
asks for. Layers of 64 or of 128 features stay on chip from the first product to the last (Müller et al. 2021);
csrc/cuda/mlp_fused.h has the equations.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _dispatch
from . import _autograd, _checks, _cuda, _dense

SHARED_BYTES = {
    64: 72 << 10,
    128: 160 << 10,
}  # by width: the least of a block's shared memory that backward can do with

_schemas = torch.library.Library("bigmodel_fast", "FRAGMENT")
_schemas.define(
    "mlp_fused_fwd(Tensor x, Tensor weights, Tensor? biases, int width, int outputs, str activation, bool save_pre) -> "
    "(Tensor y, Tensor pre)"
)
_schemas.define(
    "mlp_fused_bwd(Tensor grad_y, Tensor x, Tensor weights, Tensor? biases, Tensor pre, int width, str activation, "
    "bool wants_x, bool wants_parameters) -> (Tensor grad_x, Tensor grad_weights, Tensor grad_biases)"
)
for _name in ("mlp_fused_fwd", "mlp_fused_bwd"):
    _schemas.impl(_name, partial(_cuda.launch, _name), "CUDA")


def _fake_forward(x, weights, biases, width, outputs, activation, save_pre):
    between = weights.shape[0] - width * (x.shape[1] + outputs)
    hidden = between // (width * width) + 1
    return x.new_empty(x.shape[0], outputs), x.new_empty(hidden if save_pre else 0, x.shape[0], width)


def _fake_backward(grad_y, x, weights, biases, pre, width, activation, wants_x, wants_parameters):
    counts = (weights.shape[0], 0 if biases is None else biases.shape[0])
    grads = (x.new_empty(n if wants_parameters else 0, dtype=torch.float32) for n in counts)
    return x.new_empty(x.shape[0] if wants_x else 0, x.shape[1]), *grads


_cuda.fake("mlp_fused_fwd", _fake_forward)
_cuda.fake("mlp_fused_bwd", _fake_backward)


class _MlpFused(torch.autograd.Function):
    @staticmethod
    def forward(x, weights, biases, width, outputs, activation, save_pre):
        return torch.ops.bigmodel_fast.mlp_fused_fwd(
            x, weights.to(x.dtype), _dense.wide(biases), width, outputs, activation, save_pre
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weights, biases, ctx.width, _, ctx.activation, _ = inputs
        _, pre = output
        ctx.mark_non_differentiable(pre)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weights, biases, pre)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, _):
        if grad_y is None:
            return (None,) * 7
        x, weights, biases, pre = ctx.saved_tensors
        wants_x, wants_weights, wants_biases = ctx.needs_input_grad[:3]
        grad_x, grad_weights, grad_biases = torch.ops.bigmodel_fast.mlp_fused_bwd(
            grad_y.to(x.dtype).contiguous(),
            x,
            weights.to(x.dtype),
            _dense.wide(biases),
            pre,
            ctx.width,
            ctx.activation,
            wants_x,
            wants_weights or wants_biases,
        )
        return (
            grad_x if wants_x else None,
            grad_weights.to(weights.dtype) if wants_weights else None,
            grad_biases.to(biases.dtype) if wants_biases else None,
            *(None,) * 4,
        )


def _uncovered(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activations: Sequence[str | None]
) -> str | None:
    reason = _dispatch.unsupported(x, *weights, *biases)
    if reason is not None:
        return reason
    width, outputs = weights[0].shape[0], weights[-1].shape[0]
    if any(hasattr(t, "to_local") for t in (x, *weights)):
        return "distributed tensors"
    if x.element_size() != 2:
        return f"no CUDA C++ kernel for {x.dtype}"
    if len(weights) < 2 or width not in SHARED_BYTES or any(w.shape[0] != width for w in weights[:-1]):
        return "hidden layers that are not all 64 or all 128 wide"
    if outputs > width or 0 in (outputs, x.shape[1]):
        return "more outputs than hidden features, or a size of 0"
    if len(set(activations[:-1])) > 1 or activations[-1] is not None:
        return "layers of different activations, or one behind the last"
    properties: Any = torch.cuda.get_device_properties(x.device)
    if properties.shared_memory_per_block_optin < SHARED_BYTES[width]:
        return f"too little shared memory for layers of {width}"
    return None


def run(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], activation: str | None) -> Tensor:
    """The kernels on what they cover; parameters are laid side by side for them, in their own dtype."""
    flat = torch.cat([w.reshape(-1) for w in weights])
    offsets = None
    if any(b is not None for b in biases):
        offsets = torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)])
    save_pre = _dense.needs_grad(x, flat, offsets)
    sizes = weights[0].shape[0], weights[-1].shape[0]
    return _autograd.apply(_MlpFused, _dense.rows(x), flat, offsets, *sizes, activation or "none", save_pre)[0]


def mlp_fused(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    activations: Sequence[str | None],
    dropout: bool = False,
) -> Tensor | None:
    """All layers of an MLP at once, or None where no kernel is asked for or none covers it; explain() then says why.

    Args:
        x: [N, in], any strides; under autocast in its dtype.
        weights: [out, in] of each layer, the last included.
        biases: [out] of each layer, or None.
        activations: what follows each layer; None for the identity.
        dropout: whether layers drop elements, which no kernel does.

    Returns:
        [N, out] in x's dtype (autocast's within an autocast region), with sums in float32.
    """
    if not x.is_cuda or _dispatch.cuda_backend("mlp_fused") != "native":
        return None
    x = x.to(_checks.autocast_dtype(x) or x.dtype)
    reason = "dropout between layers" if dropout else _uncovered(x, weights, biases, activations)
    if not _dispatch.use_native("mlp_fused", reason, x):
        return None
    return run(x, weights, biases, activations[0])

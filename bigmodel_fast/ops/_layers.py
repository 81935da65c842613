"""What encoder_layer and pre_norm_layer share, layers that are one function to autograd.

They run the kernels of the operators they are made of, and spare what lies between them: gradients are added where they
are made, norms write the operands of the products beside them, and Python is called once each way.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _dispatch
from . import _checks, _dense


def compute_dtype(inputs: Sequence[Tensor], matrices: Sequence[Tensor], others: Sequence[Tensor]) -> torch.dtype | None:
    """The dtype of a layer's products; None if the operators have to be called one by one.

    They have to under torch.compile, functorch and on a GPU, and for tensors that do not lie in memory, or are not of
    dtypes, as the kernels take them.

    Args:
        inputs: [..., width], contiguous, float32 or of the dtype of the products.
        matrices: [out, in], the first of them applied to the inputs; all float32, or all of the dtype of the products.
        others: biases, norms and the like; of any dtype that kernels know.
    """
    x = inputs[0]
    if not x.is_cpu or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return None
    dtype, tensors = _checks.autocast_dtype(x) or x.dtype, (*inputs, *matrices, *others)
    if dtype not in (torch.float32, torch.bfloat16) or _dispatch.unsupported(*tensors):
        return None
    if any(type(t) not in (Tensor, torch.nn.Parameter) for t in tensors):
        return None
    width = matrices[0].shape[-1]
    for t in inputs:
        if t.dtype not in (torch.float32, dtype) or t.shape[-1] != width or t.numel() == 0 or not t.is_contiguous():
            return None
    if any(t.dtype is not matrices[0].dtype or t.stride(-1) != 1 for t in matrices):
        return None
    return dtype if matrices[0].dtype in (torch.float32, dtype) else None


def fit(shapes: Iterable[tuple[Tensor | None, tuple[int, ...]]]) -> bool:
    """Whether each tensor that there is has its shape; kernels do not ask, and operators say which has not."""
    return all(t is None or t.shape == shape for t, shape in shapes)


def to_heads(t: Tensor, head_dim: int, batch: int | None) -> Tensor:
    """[tokens, H D] to [batch, H, tokens of each, D]; without batch, for packed sequences, to [tokens, H, D]."""
    if batch is None:
        return t.view(t.shape[0], -1, head_dim)
    return t.view(batch, -1, t.shape[-1] // head_dim, head_dim).transpose(1, 2)


def to_tokens(t: Tensor) -> Tensor:
    """Back again, of what attention made, which lies in memory as [B, S, H, D] or [tokens, H, D]."""
    return t.flatten(1) if t.dim() == 3 else t.transpose(1, 2).reshape(-1, t.shape[-1] * t.shape[1])


def layer_norm_bwd(
    grad: Tensor,
    grad_sum: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
    seed: Tensor | None = None,
    p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a sum that was normed, of what was added to it (in `dtype`, before dropout), of weight and bias."""
    call = torch.ops.bigmodel_fast
    if total.dtype is dtype:
        dtotal, _, dweight, dbias = call.layer_norm_bwd(grad, grad_sum, total, weight, mean, rstd, False)
        return dtotal, _dense.before_finish(dtotal, seed, p, dtype), dweight, dbias
    return call.layer_norm_bwd(grad, grad_sum, total, weight, mean, rstd, True, seed, p)


def dtypes_of(weights: Sequence[Tensor | None]) -> list[torch.dtype | None]:
    """What backward has to know of all weights."""
    return [None if t is None else t.dtype for t in weights]


def without_biases(weights: Any) -> Any:
    """A named tuple of weights as backward keeps them: whoever changes a bias meanwhile does no harm."""
    return weights._replace(**{name: None for name in weights._fields if name.endswith("bias")})


def of_weights(
    grads: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None], wants: Sequence[Any]
) -> Iterator[Tensor | None]:
    """Gradients in the dtypes of their weights; None of those that are not wanted."""
    for grad, dtype, want in zip(grads, dtypes, wants, strict=True):
        yield grad.to(dtype) if want and grad is not None and dtype is not None else None

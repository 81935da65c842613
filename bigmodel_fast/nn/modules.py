"""Linear, LayerNorm, RMSNorm: torch's own, with our operators in forward."""

import torch
from torch import Tensor

from .. import ops


class Linear(torch.nn.Linear):
    """As torch.nn.Linear, with an activation that is fused into the product.

    Args:
        activation: one of ops.linear's, or None. An adapter around the module (peft's) adds to what comes after it.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, *, activation: str | None = None, **kw):
        super().__init__(in_features, out_features, bias, **kw)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return ops.linear(x, self.weight, self.bias, activation=self.activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation}" if self.activation else "")


class LayerNorm(torch.nn.LayerNorm):
    """As torch.nn.LayerNorm over the last dimension; forward(x, residual) also returns x + residual, which it norms."""

    def forward(self, x: Tensor, residual: Tensor | None = None):
        return ops.layer_norm(x, self.weight, self.bias, eps=self.eps, residual=residual)


class RMSNorm(torch.nn.RMSNorm):
    """As torch.nn.RMSNorm over the last dimension; forward(x, residual) also returns x + residual, which it norms."""

    def forward(self, x: Tensor, residual: Tensor | None = None):
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        if self.weight is None:
            raise ValueError("RMSNorm: elementwise_affine=False is not supported")
        return ops.rms_norm(x, self.weight, eps=eps, residual=residual)

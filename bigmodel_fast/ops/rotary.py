"""rotary: each pair (t_i, t_{i+D/2}) of query and key turned by the angle of its position (Su et al. 2021)."""

import torch
from torch import Tensor


def _rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = t.chunk(2, dim=-1)
    return (t * cos + torch.cat((-second, first), dim=-1) * sin).to(t.dtype)


def reference(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Plain torch. query, key: [B, H, S, D]; cos, sin: [S, D] or [B, S, D]."""
    if cos.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return reference(query, key, cos, sin)

"""Weights that stay the same for a while are packed once."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from . import _C


@contextmanager
def packed_weights(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Within the block, each weight is converted and packed for the matrix products once, instead of at every call.

        with bmf.packed_weights(model.parameters()):
            for micro_batch in batches:
                model(micro_batch).backward()
        optimizer.step()

    Worth it where products have few rows (micro-batches of some hundred tokens, generation) and the same weights come
    again. Takes as much memory as the weights in bfloat16 (under autocast), twice with a backward; it is given back at
    the end. Results are the same bits, except for products of up to 16 rows, which are summed in another order. CPU
    only; tensors on other devices are passed over. Blocks may be nested.

    Args:
        parameters: weights that do not change within the block.

    Raises:
        RuntimeError: at the end of the block, if a weight was changed in it: what followed may have used the old one.
            (A change through `.data` is not seen.)
    """
    weights = [p.detach() for p in parameters if p.is_cpu and p.layout is torch.strided and p.dim() == 2]
    held = [(p, p._version, p.data_ptr()) for p in weights]
    for p, _, address in held:
        last = sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
        _C.hold_weights(address, (last + 1) * p.element_size() if p.numel() else 0)
    try:
        yield
    finally:
        for *_, address in held:
            _C.release_weights(address)
    for p, version, _ in held:
        if p._version != version:
            raise RuntimeError(f"packed_weights: a weight of shape {list(p.shape)} was changed before the block ended")

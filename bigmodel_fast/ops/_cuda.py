"""The CUDA C++ kernels (csrc/cuda), where this build has them: what BMF_BACKEND=native means for CUDA tensors.

They have never run on a GPU, so nothing takes them unless told to.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _dispatch, _library

BUILT = bool(_library.build_info()["cuda"])
if BUILT:
    _dispatch.have_native_cuda(("attention", "attention_varlen", "mlp", "gated_mlp", "mlp_fused"))


def launch(name: str, *arguments: object) -> tuple[Tensor, ...]:
    """torch.ops.bigmodel_fast.<name>_cuda on the current stream of the first argument's device."""
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    moved = (a.to(device, non_blocking=True) if isinstance(a, Tensor) else a for a in arguments)
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        return getattr(torch.ops.bigmodel_fast, f"{name}_cuda")(*moved, stream)


def fake(name: str, function: Callable) -> None:
    """Registers the fake kernel of <name>, and with a stream behind its arguments of <name>_cuda."""
    torch.library.register_fake(f"bigmodel_fast::{name}", function)
    if BUILT:
        torch.library.register_fake(f"bigmodel_fast::{name}_cuda", lambda *a: function(*a[:-1]))

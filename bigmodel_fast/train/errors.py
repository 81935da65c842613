"""What can go wrong in a training run, as one line each."""

import torch

# As CUDA, cuBLAS, torch's allocator of the CPU and the C++ library say it.
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED", "not enough memory", "can't allocate memory", "bad_alloc")


class ConfigError(ValueError):
    """A setting that cannot work; the message names its key. Raised before any work starts."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model; the message says which and why."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU, whose allocators raise different types."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


class TrainError(RuntimeError):
    """A run that failed on its way (a full disk, a loss that stays NaN); what was saved before is intact."""

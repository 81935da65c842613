import torch
from hypothesis import strategies as st

from . import Error, Sample, Spec, normal, weight


def sample(batch: int, heads: int, kv_heads: int, length: int, half: int, batches_of_angles: int = 0) -> Sample:
    d = 2 * half
    table = (length, d) if batches_of_angles == 0 else (batches_of_angles, length, d)
    return Sample(
        {
            "query": normal(batch, heads, length, d),
            "key": normal(batch, kv_heads, length, d),
            "cos": weight(*table, grad=False),
            "sin": weight(*table, grad=False),
        }
    )


def zeros(*shape: int, **options: object) -> torch.Tensor:
    return torch.zeros(*shape, **options)


SPECS = (
    Spec(
        name="rotary",
        samples=(
            sample(2, 2, 1, 3, 2),
            sample(2, 3, 3, 5, 17, batches_of_angles=2),
            sample(3, 4, 2, 7, 16, batches_of_angles=1),
            sample(2, 4, 4, 130, 32),
        ),
        tail=lambda n: sample(1, 2, 1, 3, n),
        empty=(sample(0, 2, 1, 3, 2), sample(2, 0, 0, 3, 2), sample(2, 2, 1, 0, 2), sample(2, 2, 1, 3, 0)),
        shapes=st.integers(0, 3).flatmap(
            lambda batch: st.builds(
                sample,
                st.just(batch),
                st.integers(0, 4),
                st.integers(0, 4),
                st.integers(0, 20),
                st.integers(0, 40),
                st.sampled_from((0, 1, batch)),
            )
        ),
        errors=(
            Error({"query": zeros(2, 3, 4)}, ValueError, "query", "float32[2, 3, 4]", "[B, H, S, D]"),
            Error({"query": zeros(2, 2, 3, 5)}, ValueError, "query", "float32[2, 2, 3, 5]", "even"),
            Error({"key": zeros(2, 1, 4, 4)}, ValueError, "key", "float32[2, 1, 4, 4]", "[2, 1, 3, 4]"),
            Error({"key": zeros(2, 1, 3, 4, dtype=torch.int64)}, TypeError, "key", "int64", "floating point"),
            Error({"cos": zeros(3, 2)}, ValueError, "cos", "float32[3, 2]", "[3, 4]"),
            Error({"sin": zeros(1, 3, 4)}, ValueError, "sin", "float32[1, 3, 4]", "[3, 4]"),
            Error({"sin": zeros(3, 4, dtype=torch.float64)}, TypeError, "sin", "torch.float64", "one dtype"),
        ),
        autocast="keep",
        special=("query", "cos"),
    ),
)

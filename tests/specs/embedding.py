import torch
from hypothesis import strategies as st

from . import Error, Sample, Spec, classes, normal


def sample(tokens: tuple[int, ...], count: int, width: int) -> Sample:
    return Sample({"token": classes(*tokens, count=count), "weight": normal(count, width)})


def zeros(*shape: int, **options: object) -> torch.Tensor:
    return torch.zeros(*shape, **options)


SPECS = (
    Spec(
        name="embedding",
        samples=(
            sample((4,), 5, 3),
            sample((3, 7), 11, 33),
            sample((), 3, 17),
            sample((50,), 1, 300),  # one class has every token
            sample((5, 130), 700, 300),
        ),
        tail=lambda n: sample((n % 5 + 1,), n % 7 + 1, n),
        empty=(sample((0,), 5, 3), sample((2, 0), 5, 3), sample((4,), 5, 0)),
        shapes=st.builds(
            lambda batch, length, count, width: sample((batch, length), count, width),
            st.integers(0, 3),
            st.integers(0, 40),
            st.integers(1, 80),
            st.integers(0, 300),
        ),
        errors=(
            Error({"token": zeros(4)}, TypeError, "token", "float32[4]", "int64"),
            Error({"token": torch.zeros(4, dtype=torch.int32)}, TypeError, "token", "int32[4]", "int64"),
            Error({"token": torch.tensor([0, 5, 1, 2])}, IndexError, "token", "5 at position 1", "[0, 5)"),
            Error({"token": torch.tensor([0, 4, -1, 2])}, IndexError, "token", "-1 at position 2", "[0, 5)"),
            Error({"weight": zeros(0, 3)}, ValueError, "weight", "float32[0, 3]", "at least one class"),
            Error({"weight": zeros(5)}, ValueError, "weight", "float32[5]", "[classes, width]"),
            Error({"weight": zeros(5, 3, dtype=torch.int64)}, TypeError, "weight", "int64[5, 3]", "floating point"),
        ),
        autocast="keep",
        mixed=False,
        special=("weight",),
    ),
)

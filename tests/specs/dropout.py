import torch
from hypothesis import strategies as st

from . import Error, Sample, Spec, normal, weight


def sample(rows: tuple[int, ...], width: int, p: float = 0.0, stream: bool = False) -> Sample:
    """With p = 0 or 1, so that the result is known; `stream`: the residual stays float32 beside a bfloat16 x."""
    residual = (weight if stream else normal)(*rows, width)
    return Sample({"x": normal(*rows, width), "residual": residual}, {"p": p})


SPECS = (
    Spec(
        name="dropout",
        samples=(
            sample((3,), 5),
            sample((2, 3), 33, stream=True),
            sample((), 17),
            sample((2, 3), 33, p=1.0),
            sample((300,), 131, stream=True),
        ),
        tail=lambda n: sample((n % 5 + 1,), n, stream=n % 2 == 0),
        empty=(sample((0,), 4), sample((2,), 0), sample((2, 0), 4, p=1.0)),
        shapes=st.builds(
            sample,
            st.lists(st.integers(0, 9), max_size=3).map(tuple),
            st.integers(0, 300),
            st.sampled_from((0.0, 1.0)),
            st.booleans(),
        ),
        errors=(
            Error({"x": torch.zeros(3, 5, dtype=torch.int64)}, TypeError, "x", "int64[3, 5]", "floating point"),
            Error({"x": torch.zeros(())}, ValueError, "x", "float32[]", "[..., width]"),
            Error({"residual": torch.zeros(3, 4)}, ValueError, "residual", "float32[3, 4]", "[3, 5]"),
            Error({"residual": torch.zeros(3, 5, device="meta")}, ValueError, "residual", "on meta", "on cpu"),
            Error({"p": 1.5}, ValueError, "p", "1.5", "[0, 1]"),
            Error({"p": float("nan")}, ValueError, "p", "nan", "[0, 1]"),
        ),
        autocast="keep",
        special=("x",),
    ),
)

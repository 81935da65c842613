import torch
from hypothesis import strategies as st

from . import Error, Sample, Spec, normal, weight


def sample(rows: tuple[int, ...], width: int, residual: bool = False, eps: float = 1e-6) -> Sample:
    args = {"x": normal(*rows, width), "weight": weight(width)}
    if residual:
        args["residual"] = normal(*rows, width)
    return Sample(args, {"eps": eps})


SPECS = (
    Spec(
        name="rms_norm",
        samples=(
            sample((4,), 6),
            sample((3, 2), 33, residual=True),
            sample((), 17),
            sample((5,), 129, eps=0.1),
            sample((3,), 1),
            sample((700,), 100, residual=True),
        ),
        tail=lambda n: sample((n % 5 + 1,), n, residual=n % 2 == 0),
        empty=(sample((0,), 4), sample((2, 0), 4, residual=True), sample((2,), 0)),
        shapes=st.builds(
            sample,
            st.lists(st.integers(0, 14), max_size=3).map(tuple),
            st.integers(2, 300),  # of a single element the gradient is a difference of equal numbers
            st.booleans(),
            st.sampled_from((1e-6, 1e-3)),
        ),
        errors=(
            Error({"weight": None}, TypeError, "weight", "None", "a tensor"),
            Error({"x": torch.zeros(4, 6, dtype=torch.bool)}, TypeError, "x", "bool[4, 6]", "floating point"),
            Error({"x": torch.zeros(())}, ValueError, "x", "float32[]", "[..., width]"),
            Error({"weight": torch.zeros(5)}, ValueError, "weight", "float32[5]", "[6]"),
            Error({"residual": torch.zeros(6)}, ValueError, "residual", "float32[6]", "[4, 6]"),
        ),
        autocast="output",
        special=("x", "weight"),
    ),
)

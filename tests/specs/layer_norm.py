import torch
from hypothesis import strategies as st

from . import Error, Sample, Spec, normal, weight


def sample(rows: tuple[int, ...], width: int, residual: bool = False, affine: bool = True, eps: float = 1e-5) -> Sample:
    args = {"x": normal(*rows, width)}
    options = {"eps": eps}
    if affine:
        args |= {"weight": weight(width), "bias": weight(width)}
    else:
        options |= {"weight": None, "bias": None}
    if residual:
        args["residual"] = normal(*rows, width)
    return Sample(args, options)


SPECS = (
    Spec(
        name="layer_norm",
        samples=(
            sample((4,), 6),
            sample((3, 2), 33, residual=True),
            sample((), 17),
            sample((5,), 40, affine=False, eps=0.1),
            sample((1, 9), 129, residual=True, affine=False),
            sample((3,), 1),
            sample((700,), 100, residual=True),
        ),
        tail=lambda n: sample((n % 5 + 1,), n, residual=n % 2 == 0),
        empty=(sample((0,), 4), sample((2, 0), 4, residual=True), sample((2,), 0)),
        shapes=st.builds(
            sample,
            st.lists(st.integers(0, 14), max_size=3).map(tuple),
            st.integers(2, 300),
            st.booleans(),
            st.booleans(),
            st.sampled_from((1e-5, 1e-3)),
        ),
        errors=(
            Error({"x": None}, TypeError, "x", "None", "a tensor"),
            Error({"x": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "x", "int64[4, 6]", "floating point"),
            Error({"x": torch.zeros(())}, ValueError, "x", "float32[]", "[..., width]"),
            Error({"weight": torch.zeros(5)}, ValueError, "weight", "float32[5]", "[6]"),
            Error({"bias": torch.zeros(4, 6)}, ValueError, "bias", "float32[4, 6]", "[6]"),
            Error({"residual": torch.zeros(6)}, ValueError, "residual", "float32[6]", "[4, 6]"),
        ),
        autocast="output",
        special=("x", "weight"),
    ),
)

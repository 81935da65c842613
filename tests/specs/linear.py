import torch
from hypothesis import strategies as st

from . import Error, Sample, Spec, normal, weight

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh", "relu2")


def sample(
    rows: tuple[int, ...],
    k: int,
    n: int,
    bias: bool = True,
    activation: str | None = None,
    residual: bool = False,
    **options: float,
) -> Sample:
    args = {"x": normal(*rows, k), "weight": weight(n, k), **({"bias": weight(n)} if bias else {})}
    if residual:
        args["residual"] = weight(*rows, n)  # float32 beside a bfloat16 x
    return Sample(args, {"activation": activation, **options})


SPECS = (
    Spec(
        name="linear",
        samples=(
            sample((5,), 7, 3),
            sample((), 17, 5, bias=False),
            *(sample((2, 3), 33, 20, activation=a) for a in ACTIVATIONS),
            sample((7,), 65, 130, bias=False, activation="silu"),
            sample((2, 9), 17, 70, activation="gelu", residual=True),
            sample((2, 9), 17, 70, residual=True, dropout_p=1.0),
            sample((150,), 200, 132, activation="gelu"),
        ),
        tail=lambda n: sample((n % 13 + 1,), n, n * 7 % 71 + 1, activation="gelu"),
        empty=(sample((0,), 4, 3), sample((2,), 0, 3), sample((2,), 4, 0), sample((3, 0), 4, 2, False, "relu")),
        shapes=st.builds(
            sample,
            st.lists(st.integers(0, 14), max_size=3).map(tuple),
            st.integers(0, 140),
            st.integers(0, 140),
            st.booleans(),
            st.sampled_from((None, *ACTIVATIONS)),
        ),
        errors=(
            Error({"x": [1.0]}, TypeError, "x", "list", "a tensor"),
            Error({"x": torch.zeros(5, 7, dtype=torch.int64)}, TypeError, "x", "int64[5, 7]", "floating point"),
            Error({"x": torch.zeros(())}, ValueError, "x", "float32[]", "[..., in]"),
            Error({"weight": torch.zeros(7)}, ValueError, "weight", "float32[7]", "[out, in]"),
            Error({"weight": torch.zeros(3, 8)}, ValueError, "weight", "float32[3, 8]", "[out, 7]"),
            Error({"weight": torch.zeros(3, 7, device="meta")}, ValueError, "weight", "on meta", "on cpu"),
            Error({"bias": torch.zeros(4)}, ValueError, "bias", "float32[4]", "[3]"),
            Error({"residual": torch.zeros(5, 7)}, ValueError, "residual", "float32[5, 7]", "[5, 3]"),
            Error({"dropout_p": -0.1}, ValueError, "dropout_p", "-0.1", "[0, 1]"),
            Error({"activation": "swish"}, ValueError, "activation", "'swish'", "gelu"),
        ),
        autocast="cast",
        special=("x", "weight"),
    ),
)

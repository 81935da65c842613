import torch
from hypothesis import strategies as st

from . import Error, Sample, Spec, normal, weight
from .cross_entropy import ERRORS, OPTIONS, targets_of


def sample(rows: tuple[int, ...], k: int, count: int, ignored: int = 0, bias: bool = True, **options: object) -> Sample:
    args = {
        "x": normal(*rows, k, scale=2),
        "weight": weight(count, k),
        "target": targets_of(rows, count, ignored, options),
    }
    if bias:
        args["bias"] = weight(count)
    return Sample(args, options)


SPECS = (
    Spec(
        name="linear_cross_entropy",
        samples=(
            sample((4,), 3, 5),
            *(sample((2, 3), 17, 33, 3, **options) for options in OPTIONS),
            sample((), 9, 17, bias=False),
            sample((64,), 70, 33, 5),  # fewer classes than x is wide
            sample((3,), 5, 7, 1),  # every target ignored: the mean is NaN
            sample((200,), 64, 301, 7, bias=False, softcap=10.0, label_smoothing=0.1),
            # Several chunks, of which the first one's logits lie where dW will be.
            sample((560,), 400, 300, 9, label_smoothing=0.1),
            sample((300,), 276, 4160, bias=False),
        ),
        tail=lambda n: sample((n % 13 + 1,), n * 5 % 37 + 1, n, n % 3, n % 2 == 0, **OPTIONS[n % len(OPTIONS)]),
        empty=(sample((0,), 4, 3), sample((2, 0), 4, 3, reduction="none"), sample((2,), 0, 3)),
        shapes=st.builds(
            lambda rows, k, count, ignored, bias, options: sample(rows, k, count, ignored, bias, **options),
            st.lists(st.integers(0, 10), max_size=3).map(tuple),
            st.integers(0, 70),
            st.integers(1, 150),
            st.integers(0, 4),
            st.booleans(),
            st.sampled_from(OPTIONS),
        ),
        errors=(
            Error({"x": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "x", "int64[4, 3]", "floating point"),
            Error({"x": torch.zeros(())}, ValueError, "x", "float32[]", "[..., in]"),
            Error({"weight": torch.zeros(5, 4)}, ValueError, "weight", "float32[5, 4]", "[out, 3]"),
            Error({"weight": torch.zeros(0, 3), "bias": None}, ValueError, "weight", "float32[0, 3]", "one class"),
            Error({"bias": torch.zeros(4)}, ValueError, "bias", "float32[4]", "[5]"),
            *ERRORS,
        ),
        autocast="cast",
        special=("x", "weight"),
    ),
)

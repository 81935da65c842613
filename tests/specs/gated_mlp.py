import torch
from hypothesis import strategies as st

from . import Error, Sample, Spec, normal, weight
from .linear import ACTIVATIONS


def sample(rows: tuple[int, ...], k: int, hidden: int, n: int, activation: str = "silu") -> Sample:
    args = {"x": normal(*rows, k), "w_gate": weight(hidden, k), "w_up": weight(hidden, k), "w_down": weight(n, hidden)}
    return Sample(args, {"activation": activation})


SPECS = (
    Spec(
        name="gated_mlp",
        samples=(
            sample((3,), 5, 6, 4),
            *(sample((2, 3), 17, 40, 9, activation=a) for a in ACTIVATIONS),
            sample((), 33, 70, 20),
            sample((130,), 96, 200, 80),
        ),
        tail=lambda n: sample((n % 13 + 1,), n * 5 % 37 + 1, n, n * 7 % 71 + 1),
        empty=(sample((0,), 4, 5, 3), sample((2,), 0, 5, 3), sample((2,), 4, 0, 3), sample((2,), 4, 5, 0)),
        shapes=st.builds(
            sample,
            st.lists(st.integers(0, 14), max_size=3).map(tuple),
            *(st.integers(0, 100) for _ in range(3)),
            st.sampled_from(ACTIVATIONS),
        ),
        errors=(
            Error({"x": torch.zeros(3, 5, dtype=torch.int32)}, TypeError, "x", "int32[3, 5]", "floating point"),
            Error({"x": torch.zeros(())}, ValueError, "x", "float32[]", "[..., in]"),
            Error({"w_gate": torch.zeros(6, 4)}, ValueError, "w_gate", "float32[6, 4]", "[out, 5]"),
            Error({"w_up": torch.zeros(7, 5)}, ValueError, "w_up", "float32[7, 5]", "[6, 5]"),
            Error({"w_down": torch.zeros(4, 7)}, ValueError, "w_down", "float32[4, 7]", "[out, 6]"),
            Error({"activation": "swiglu"}, ValueError, "activation", "'swiglu'", "silu"),
        ),
        autocast="cast",
        special=("x", "w_up"),
    ),
)

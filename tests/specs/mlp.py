from dataclasses import replace

import torch
from hypothesis import strategies as st

from . import Error, Sample, Spec, normal, weight
from .linear import ACTIVATIONS


def sample(rows: tuple[int, ...], k: int, hidden: int, n: int, biases: bool = True, activation: str = "gelu") -> Sample:
    args = {"x": normal(*rows, k), "w1": weight(hidden, k), "w2": weight(n, hidden)}
    if not biases:
        return Sample(args, {"b1": None, "b2": None, "activation": activation})
    return Sample({**args, "b1": weight(hidden), "b2": weight(n)}, {"activation": activation})


def with_residual(rows: tuple[int, ...], k: int, hidden: int, n: int) -> Sample:
    plain = sample(rows, k, hidden, n)
    return replace(plain, args={**plain.args, "residual": weight(*rows, n)})


SPECS = (
    Spec(
        name="mlp",
        samples=(
            sample((3,), 5, 6, 4),
            *(sample((2, 3), 17, 40, 9, activation=a) for a in ACTIVATIONS),
            sample((), 33, 70, 20, biases=False),
            with_residual((2, 9), 17, 40, 70),
            sample((130,), 96, 200, 80),
        ),
        tail=lambda n: sample((n % 13 + 1,), n * 5 % 37 + 1, n, n * 7 % 71 + 1),
        empty=(sample((0,), 4, 5, 3), sample((2,), 0, 5, 3), sample((2,), 4, 0, 3), sample((2,), 4, 5, 0)),
        shapes=st.builds(
            sample,
            st.lists(st.integers(0, 14), max_size=3).map(tuple),
            *(st.integers(0, 100) for _ in range(3)),
            st.booleans(),
            st.sampled_from(ACTIVATIONS),
        ),
        errors=(
            Error({"x": torch.zeros(3, 5, dtype=torch.int32)}, TypeError, "x", "int32[3, 5]", "floating point"),
            Error({"x": torch.zeros(())}, ValueError, "x", "float32[]", "[..., in]"),
            Error({"w1": torch.zeros(6, 4)}, ValueError, "w1", "float32[6, 4]", "[out, 5]"),
            Error({"b1": torch.zeros(5)}, ValueError, "b1", "float32[5]", "[6]"),
            Error({"w2": torch.zeros(4, 7)}, ValueError, "w2", "float32[4, 7]", "[out, 6]"),
            Error({"b2": torch.zeros(1, 4)}, ValueError, "b2", "float32[1, 4]", "[4]"),
            Error({"activation": None}, ValueError, "activation", "None", "gelu"),
        ),
        autocast="cast",
        special=("x", "w2"),
    ),
)

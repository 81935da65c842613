import torch
from hypothesis import strategies as st

from . import Error, Sample, Spec, classes, normal

OPTIONS = (
    {},
    {"reduction": "sum", "label_smoothing": 0.1},
    {"reduction": "none", "ignore_index": 2},
    {"softcap": 3.0},
    {"softcap": 5.0, "label_smoothing": 0.2, "reduction": "none"},
)


def targets_of(rows: tuple[int, ...], count: int, ignored: int, options: dict):
    return classes(*rows, count=count, ignored=ignored, ignore_index=options.get("ignore_index", -100))


def sample(rows: tuple[int, ...], count: int, ignored: int = 0, **options: object) -> Sample:
    return Sample(
        {"logits": normal(*rows, count, scale=3), "target": targets_of(rows, count, ignored, options)}, options
    )


ERRORS = (
    Error({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, "target", "int32[4]", "int64"),
    Error({"target": torch.zeros(4, 5)}, TypeError, "target", "float32[4, 5]", "int64"),
    Error({"target": torch.zeros(5, dtype=torch.int64)}, ValueError, "target", "int64[5]", "[4]"),
    Error({"target": torch.tensor([0, 1, 5, 2])}, IndexError, "target", "5 at position 2", "[0, 5)"),
    Error({"target": torch.tensor([0, -1, 4, 2])}, IndexError, "target", "-1 at position 1", "[0, 5)"),
    Error({"label_smoothing": 1.5}, ValueError, "label_smoothing", "1.5", "[0, 1]"),
    Error({"label_smoothing": float("nan")}, ValueError, "label_smoothing", "nan", "[0, 1]"),
    Error({"softcap": 0.0}, ValueError, "softcap", "0.0", "positive"),
    Error({"reduction": "avg"}, ValueError, "reduction", "'avg'", "mean, sum, none"),
)

SPECS = (
    Spec(
        name="cross_entropy",
        samples=(
            sample((4,), 5),
            *(sample((2, 3), 33, 3, **options) for options in OPTIONS),
            sample((), 17),
            sample((3,), 7, 1),  # every target ignored: the mean is NaN
            sample((3,), 1, reduction="none"),
            sample((300,), 131, 7, softcap=10.0, label_smoothing=0.1),
        ),
        tail=lambda n: sample((n % 5 + 1,), n, n % 3, **OPTIONS[n % len(OPTIONS)]),
        empty=(sample((0,), 4), sample((2, 0), 4, reduction="none"), sample((0,), 4, reduction="sum")),
        shapes=st.builds(
            lambda rows, count, ignored, options: sample(rows, count, ignored, **options),
            st.lists(st.integers(0, 14), max_size=3).map(tuple),
            st.integers(1, 300),
            st.integers(0, 4),
            st.sampled_from(OPTIONS),
        ),
        errors=(
            Error(
                {"logits": torch.zeros(4, 5, dtype=torch.int64)}, TypeError, "logits", "int64[4, 5]", "floating point"
            ),
            Error({"logits": torch.zeros(4, 0)}, ValueError, "logits", "float32[4, 0]", "[..., classes]"),
            *ERRORS,
        ),
        autocast="keep",
        mixed=False,
        special=("logits",),
    ),
)

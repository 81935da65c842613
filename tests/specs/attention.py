import torch
from hypothesis import strategies as st

from . import Arg, Error, Sample, Spec, fixed, normal


def sample(
    batch: int,
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    dim: int,
    lengths: list[int] | None = None,
    **options,
) -> Sample:
    if heads != kv_heads:
        options["enable_gqa"] = True
    args = {
        "query": normal(batch, heads, queries, dim),
        "key": normal(batch, kv_heads, keys, dim),
        "value": normal(batch, kv_heads, keys, dim),
    }
    if lengths is not None:
        args["key_lengths"] = fixed(lengths)
    return Sample(args, options)


def biased(of: Sample, *shape: int) -> Sample:
    return Sample({**of.args, "attn_mask": normal(*shape)}, of.options)


def masked(of: Sample, *shape: int, visible: float = 0.7) -> Sample:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < visible
    return Sample({**of.args, "attn_mask": Arg(grad=False, values=mask)}, of.options)


def slopes(heads: int) -> torch.Tensor:
    return 2.0 ** -torch.arange(1, heads + 1)


def packed(heads: int, kv_heads: int, dim: int, queries: list[int], keys: list[int], **options) -> Sample:
    def boundaries(lengths: list[int]) -> Arg:
        return fixed(torch.tensor([0, *lengths]).cumsum(0), torch.int32)

    if heads != kv_heads:
        options["enable_gqa"] = True
    return Sample(
        {
            "query": normal(sum(queries), heads, dim),
            "key": normal(sum(keys), kv_heads, dim),
            "value": normal(sum(keys), kv_heads, dim),
            "cu_seqlens_q": boundaries(queries),
            "cu_seqlens_k": boundaries(keys),
        },
        options,
    )


# Every feature alone; each pair of them meets in the drawn samples.
FEATURES: dict[str, list] = {
    "is_causal": [False, True],
    "window": [None, 5, (9, 2), (0, 0), (3, 1 << 60)],
    "softcap": [None, 1.5],
    "scale": [None, 0.2, -0.1, 0.0],
}


@st.composite
def drawn(draw: st.DrawFn) -> Sample:
    batch, kv_heads, group = draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys = draw(st.integers(0, 40) | st.just(200)), draw(st.integers(0, 40) | st.just(300))
    dim = draw(st.integers(1, 40) | st.sampled_from([64, 80, 96, 112, 128]))
    options = {name: draw(st.sampled_from(values)) for name, values in FEATURES.items()}
    if draw(st.booleans()):
        options["alibi_slopes"] = slopes(group * kv_heads)
    lengths = draw(st.lists(st.integers(0, keys), min_size=batch, max_size=batch)) if draw(st.booleans()) else None
    made = sample(batch, group * kv_heads, kv_heads, queries, keys, dim, lengths, **options)
    full = (batch, group * kv_heads, queries, keys)
    shape = [draw(st.sampled_from([1, n])) for n in full]
    kind = draw(st.sampled_from(["none", "bias", "mask"]))
    # A bias that is the same for all keys leaves the softmax as it is: its gradient is the rounding errors of zero.
    if kind == "bias" and shape[-1] > 1:
        return biased(made, *shape)
    return masked(made, *shape) if kind == "mask" else made


@st.composite
def drawn_packed(draw: st.DrawFn) -> Sample:
    lengths = draw(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=4))
    kv_heads, group, dim = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 80))
    options = {name: draw(st.sampled_from(values)) for name, values in FEATURES.items()}
    if draw(st.booleans()):
        options["alibi_slopes"] = slopes(group * kv_heads)
    return packed(group * kv_heads, kv_heads, dim, [q for q, _ in lengths], [k for _, k in lengths], **options)


def zeros(*shape: int, **options: object) -> torch.Tensor:
    return torch.zeros(*shape, **options)


OPTION_ERRORS = (
    Error({"dropout_p": 1.5}, ValueError, "dropout_p", "1.5", "[0, 1]"),
    Error({"scale": float("nan")}, ValueError, "scale", "nan", "finite"),
    Error({"softcap": -1.0}, ValueError, "softcap", "-1.0", "positive"),
    Error({"window": -1}, ValueError, "window", "-1", "0 or more"),
    Error({"window": (1, 2, 3)}, ValueError, "window", "(1, 2, 3)", "(left, right)"),
    Error({"alibi_slopes": zeros(3)}, ValueError, "alibi_slopes", "float32[3]", "[2]"),
    Error({"alibi_slopes": torch.ones(2, dtype=torch.int64)}, TypeError, "alibi_slopes", "int64[2]", "floating point"),
)

SPECS = (
    Spec(
        name="attention",
        samples=(
            sample(2, 2, 2, 5, 5, 8),
            sample(2, 4, 2, 33, 33, 16, is_causal=True),
            sample(2, 2, 1, 20, 45, 24, [45, 17], is_causal=True),
            sample(1, 2, 2, 70, 30, 5, is_causal=True),  # the first queries see nothing
            sample(1, 2, 2, 130, 130, 32, window=(40, 10)),
            sample(2, 3, 3, 1, 50, 64, is_causal=True),
            sample(1, 4, 2, 3, 1100, 16, softcap=2.0, is_causal=True),
            masked(sample(2, 2, 1, 4, 37, 16, [37, 20], window=(9, 5)), 2, 1, 4, 37),
            sample(2, 8, 2, 2, 1100, 40, [1100, 7]),
            sample(1, 2, 2, 40, 40, 16, softcap=2.0, is_causal=True),
            sample(1, 2, 2, 40, 40, 16, alibi_slopes=slopes(2), is_causal=True),
            biased(sample(2, 4, 2, 20, 37, 16), 1, 4, 20, 37),
            biased(sample(2, 2, 2, 20, 300, 16, softcap=2.0, is_causal=True), 2, 1, 1, 300),
            masked(sample(2, 2, 2, 20, 37, 16), 2, 1, 20, 37),
            masked(sample(1, 2, 2, 9, 7, 16), 1, 2, 9, 7, visible=0.1),
            sample(1, 1, 1, 260, 260, 128, is_causal=True),
            sample(2, 3, 1, 300, 300, 64, is_causal=True),
        ),
        tail=lambda n: sample(1, 2, 1, n, n + 3, n % 29 + 2, is_causal=n % 2 == 0),
        empty=(
            sample(0, 2, 2, 3, 3, 4),
            sample(2, 0, 0, 3, 3, 4),
            sample(2, 2, 2, 0, 3, 4),
            sample(2, 2, 2, 3, 0, 4),
            sample(2, 2, 2, 5, 6, 4, [0, 6]),
        ),
        shapes=drawn(),
        errors=(
            Error({"query": zeros(2, 5, 8)}, ValueError, "query", "float32[2, 5, 8]", "[B, H, S, D]"),
            Error({"query": zeros(2, 2, 5, 8, dtype=torch.int64)}, TypeError, "query", "int64", "floating point"),
            Error({"query": None}, TypeError, "query", "None", "tensor"),
            Error({"key": zeros(2, 2, 5, 9)}, ValueError, "key", "float32[2, 2, 5, 9]", "8"),
            Error(
                {"key": zeros(3, 2, 5, 8), "value": zeros(3, 2, 5, 8)}, ValueError, "key", "[3, 2, 5, 8]", "batch of 2"
            ),
            Error(
                {"key": zeros(2, 1, 5, 8), "value": zeros(2, 1, 5, 8)}, ValueError, "key", "[2, 1, 5, 8]", "enable_gqa"
            ),
            Error(
                {"key": zeros(2, 3, 5, 8), "value": zeros(2, 3, 5, 8), "enable_gqa": True},
                ValueError,
                "key",
                "[2, 3, 5, 8]",
                "multiple",
            ),
            Error({"value": zeros(2, 2, 6, 8)}, ValueError, "value", "float32[2, 2, 6, 8]", "[2, 2, 5, 8]"),
            Error({"value": zeros(2, 2, 5, 8, dtype=torch.float64)}, TypeError, "value", "float64", "float32"),
            Error({"attn_mask": zeros(2, 5)}, ValueError, "attn_mask", "float32[2, 5]", "[2, 2, 5, 5]"),
            Error({"attn_mask": torch.ones(5, 5, dtype=torch.int64)}, TypeError, "attn_mask", "int64[5, 5]", "bool"),
            Error({"key_lengths": zeros(2)}, TypeError, "key_lengths", "float32[2]", "int64"),
            Error({"key_lengths": torch.tensor([1])}, ValueError, "key_lengths", "int64[1]", "[2]"),
            Error({"key_lengths": torch.tensor([1, 6])}, ValueError, "key_lengths", "[1, 6]", "[0, 5]"),
            *OPTION_ERRORS,
        ),
        autocast="cast",
        mixed=False,
        special=("query", "key"),
        differences=True,
    ),
    Spec(
        name="attention_varlen",
        samples=(
            packed(2, 2, 8, [3, 2], [3, 2]),
            packed(4, 2, 16, [5, 0, 33, 2], [9, 0, 30, 40], is_causal=True),
            packed(2, 2, 24, [7, 1], [0, 20], window=4),
            packed(2, 1, 16, [1, 1, 1], [5, 70, 3], is_causal=True),
            packed(2, 2, 16, [30, 11], [30, 11], softcap=2.0, alibi_slopes=slopes(2), is_causal=True),
            packed(3, 3, 64, [200, 31, 90], [200, 31, 90], is_causal=True),
        ),
        tail=lambda n: packed(2, 1, n % 29 + 2, [n, 3], [n + 3, n], is_causal=n % 2 == 0),
        empty=(packed(2, 2, 4, [0, 0], [0, 3]), packed(0, 0, 4, [2], [3])),
        shapes=drawn_packed(),
        errors=(
            Error({"query": zeros(1, 5, 2, 8)}, ValueError, "query", "float32[1, 5, 2, 8]", "[tokens, H, D]"),
            Error({"key": zeros(5, 2, 4)}, ValueError, "key", "float32[5, 2, 4]", "8"),
            Error({"cu_seqlens_q": zeros(3)}, TypeError, "cu_seqlens_q", "float32[3]", "int64"),
            Error(
                {"cu_seqlens_q": torch.tensor([[0, 5]])}, ValueError, "cu_seqlens_q", "int64[1, 2]", "[sequences + 1]"
            ),
            Error({"cu_seqlens_q": torch.tensor([0, 3, 4])}, ValueError, "cu_seqlens_q", "[0, 3, 4]", "tokens, 5"),
            Error({"cu_seqlens_k": torch.tensor([0, 6, 5])}, ValueError, "cu_seqlens_k", "[0, 6, 5]", "rise"),
            Error({"cu_seqlens_k": torch.tensor([0, 5])}, ValueError, "cu_seqlens_k", "int64[2]", "[3]"),
            *OPTION_ERRORS,
        ),
        autocast="cast",
        mixed=False,
        special=("query", "key"),
        differences=True,
    ),
)

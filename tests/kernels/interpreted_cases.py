"""Run by test_interpreter.py under TRITON_INTERPRET=1: what no sample of an operator reaches. Launchers are called as
they are, on CPU tensors, and compared with the C++ kernels of the same operator.
"""

import importlib
import os
from collections.abc import Sequence

import numerics
import pytest
import torch
from bigmodel_fast.kernels import (
    attention,
    attention_tiles,
    cross_entropy,
    dropout,
    embedding,
    gemm,
    launch,
    layer_norm,
    linear,
    linear_cross_entropy,
    mlp,
    optim,
    rms_norm,
)
from torch import Tensor

assert os.environ.get("TRITON_INTERPRET") == "1", "run by test_interpreter.py"

native = torch.ops.bigmodel_fast
activate = importlib.import_module("bigmodel_fast.ops._activation").activate
attention_reference = importlib.import_module("bigmodel_fast.ops.attention").reference
generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def assert_as_native(actual: Sequence[Tensor], expected: Sequence[Tensor], what: str) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.dtype == e.dtype, f"{what} {i}"
        error, ulp = numerics.max_error(a, e.double()), torch.finfo(torch.float32).eps * numerics.largest(e)
        assert error <= 2 * numerics.BACKWARD * numerics.ULPS * ulp, f"{what} {i}: {error}"  # both have errors


@pytest.mark.parametrize("keys", [32, 64, 128])
def test_dropout_makes_the_choices_of_the_cpu(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tiles are: forward, and all gradients, the bias's included."""
    monkeypatch.setattr(attention, "choose", lambda *_: launch.Tiles(16, keys, 4, 1))
    q, k, v, bias = normal(2, 2, 40, 16), normal(2, 1, 300, 16), normal(2, 1, 300, 16), normal(1, 2, 40, 300)
    options = (None, None, None, None, torch.tensor([987654321987654]), 0.25, 0.0, 1 << 40, 0, 0.3)
    expanded = bias.expand(2, 2, 40, 300)
    out, stats = native.attention_fwd(q, k, v, expanded, *options)
    ours, our_stats = attention.attention_fwd(q, k, v, expanded, *options)
    assert_as_native([ours], [out], "out")
    backward = (*options, [1, 2, 40, 300], False)
    expected = native.attention_bwd(q, q, k, v, out, stats, expanded, *backward)
    made = attention.attention_bwd(q, q, k, v, ours, our_stats, expanded, *backward)
    assert_as_native(made, expected, "gradient")


@pytest.mark.parametrize("residual", [None, torch.float32])
def test_dropout_alone_makes_the_choices_of_the_cpu(residual: torch.dtype | None) -> None:
    x, seed = normal(37, 303)[:, :301], torch.tensor([987654321987654])
    added = None if residual is None else normal(37, 301)
    expected = native.dropout_fwd(x, seed, 0.3, added, torch.float32)
    assert_as_native([dropout.dropout_fwd(x, seed, 0.3, added, torch.float32)], [expected], "y")
    weight, bias = normal(301, 301), normal(301)
    expected, _ = native.linear_fwd(x, weight, bias, "gelu", False, added, seed, 0.3)
    made, _ = linear.linear_fwd(x, weight, bias, "gelu", False, added, seed, 0.3)
    assert_as_native([made], [expected], "linear")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_token_accuracy(reduction: str) -> None:
    x, weight = normal(60, 16), normal(33, 16)
    target = torch.where(torch.arange(60) % 2 == 0, (x @ weight.T).argmax(1), 3)
    target[::7] = -100
    arguments = (x, weight, None, target, -100, 0.1, 5.0, reduction, [False] * 3)
    expected, actual = (
        native.linear_cross_entropy_fwd(*arguments)[-1],
        linear_cross_entropy.linear_cross_entropy_fwd(*arguments)[-1],
    )
    assert 0.3 < expected < 0.9
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("shape", [(1, 1, 40, 70), (2, 1, 1, 70), (1, 3, 40, 1), (1, 1, 1, 70), (2, 3, 1, 1)], ids=str)
def test_bias_gradients_are_summed_to_its_shape(shape: tuple[int, ...]) -> None:
    q, k, v, bias = normal(2, 3, 40, 8), normal(2, 3, 70, 8), normal(2, 3, 70, 8), normal(*shape)
    expanded = bias.expand(2, 3, 40, 70)
    options = (None, None, None, None, None, 0.3, 2.0, 1 << 40, 1 << 40, 0.0)
    out, stats = native.attention_fwd(q, k, v, expanded, *options)
    ours, our_stats = attention.attention_fwd(q, k, v, expanded, *options)
    expected = native.attention_bwd(q, q, k, v, out, stats, expanded, *options, list(shape), False)
    made = attention.attention_bwd(q, q, k, v, ours, our_stats, expanded, *options, list(shape), False)
    scale = numerics.largest(expected[0])  # of a bias that is the same for all keys the gradient vanishes
    assert numerics.max_error(made[3], expected[3].double()) <= 1000 * torch.finfo(torch.float32).eps * scale


DECODED = {
    "one": {},
    "one-split": {"keys": 150, "batch": 5},
    "causal": {"queries": 5, "causal": True, "keys": 704},
    "window": {"queries": 3, "causal": True, "window": 500},
    "gqa": {"queries": 2, "heads": 6, "key_heads": 2, "causal": True, "keys": 513},
    "softcap-alibi": {"heads": 4, "key_heads": 1, "softcap": 2.0, "alibi": True},
    "bias": {"queries": 3, "heads": 4, "key_heads": 2, "bias": (1, 4, 3, 700)},
    "mask": {"queries": 2, "bias": (2, 1, 1, 700), "boolean": True},
    "lengths": {"queries": 2, "lengths": [0, 333], "causal": True},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", DECODED.values(), ids=DECODED)
def test_few_queries_of_many_keys(case: dict, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As near to float64 as plain torch is; the same bits twice; what backward reads is the general kernel's."""
    case = {"queries": 1, "keys": 700, "heads": 3, "key_heads": 3, "batch": 2} | case
    queries, keys, dim, everything = case["queries"], case["keys"], 24, 1 << 40
    query = normal(case["batch"], queries, case["heads"], dim + 5)[..., :dim].transpose(1, 2)  # with gaps between rows
    key, value = (normal(case["batch"], case["key_heads"], keys, dim) for _ in range(2))
    query, key, value = (t.to(dtype) for t in (query, key, value))
    mask = None if "bias" not in case else normal(*case["bias"])
    mask = mask > 0 if case.get("boolean") else None if mask is None else mask.to(dtype)
    slopes = torch.rand(case["heads"], generator=generator) if "alibi" in case else None
    lengths = torch.tensor(case["lengths"]) if "lengths" in case else None
    left = case.get("window", everything)
    call = (
        query, key, value, None if mask is None else mask.expand(*query.shape[:3], keys), slopes, lengths, None, None,
        None, dim**-0.5, case.get("softcap", 0.0), left, 0 if case.get("causal") else left, 0.0,
    )  # fmt: skip
    started, run = [], launch.run
    monkeypatch.setattr(launch, "run", lambda kernel, *rest: (started.append(kernel.__name__), run(kernel, *rest)))
    with launch.assume(launch.Target(90, 8)):
        out, stats = attention.attention_fwd(*call)
        assert started == ["decode", "combine"][: 1 if keys < 200 else 2]
        assert all(torch.equal(a, b) for a, b in zip(attention.attention_fwd(*call), (out, stats), strict=True))
    options = {
        "attn_mask": mask, "is_causal": case.get("causal", False), "window": case.get("window"), "enable_gqa": True,
        "softcap": case.get("softcap"), "alibi_slopes": slopes, "key_lengths": lengths,
    }  # fmt: skip
    exact = attention_reference(query.double(), key.double(), value.double(), **options)
    numerics.assert_close(out, attention_reference(query, key, value, **options), exact, numerics.FORWARD, "out")
    monkeypatch.setattr(attention, "DECODE_KEYS", 1 << 30)
    _, general = attention.attention_fwd(*call)
    assert started[-1] == "forward"
    assert_as_native([stats], [general], "statistics")


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_nan_passes_through_splits(name: str) -> None:
    tensors = {"query": normal(1, 1, 2, 8), "key": normal(1, 1, 600, 8), "value": normal(1, 1, 600, 8)}
    tensors[name][0, 0, -1, 3] = torch.nan
    options = (None, None, None, None, None, None, 0.3, 0.0, 1 << 40, 0, 0.0)
    with launch.assume(launch.Target(90, 8)):
        out, _ = attention.attention_fwd(*tensors.values(), *options)
    expected = attention_reference(**tensors, is_causal=True)
    assert torch.equal(out.isnan(), expected.isnan())
    assert out.isnan().any()


def test_splits_cover_the_keys() -> None:
    """Every key from the first that is seen, in whole blocks, by programs of which none is idle."""
    for first in (0, 63, 64, 1000):
        for keys in (first + 1, first + 700, first + 100_000):
            for programs in (0, 1, 7, 10_000):
                splits = attention_tiles.split_keys(first, keys, 64, programs, 132)
                assert splits.first <= first < splits.first + 64
                assert splits.span % 64 == splits.first % 64 == 0
                assert (
                    splits.first + splits.span * (splits.count - 1) < keys <= splits.first + splits.span * splits.count
                )
                assert splits.count <= attention_tiles.MOST_SPLITS
    assert attention_tiles.split_keys(0, 100_000, 64, 8, 132).count * 8 >= 132
    assert attention_tiles.split_keys(0, 100_000, 64, 10_000, 132).count == 1


def test_gradients_side_by_side() -> None:
    q, k = normal(2, 4, 20, 8), normal(2, 2, 20, 8)
    options = (None, None, None, None, None, None, 0.3, 0.0, 1 << 40, 0, 0.0)
    out, stats = attention.attention_fwd(q, k, k, *options)
    apart = attention.attention_bwd(q, q, k, k, out, stats, *options, [], False)
    joined, *_ = attention.attention_bwd(q, q, k, k, out, stats, *options, [], True)
    assert torch.equal(joined, torch.cat([t.transpose(1, 2) for t in apart[:3]], dim=2))


SMALL_BLOCKS = gemm.Blocks(16, 32, 16, 4, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["none", "relu2", "gelu", "tanh"])
@pytest.mark.parametrize("shape", [(1, 16, 1), (16, 16, 32), (150, 32, 70)], ids=str)
def test_dense_layer_in_one_kernel(shape: tuple[int, int, int], activation: str, dtype: torch.dtype) -> None:
    """Fewer programs than tiles, several bands, edges, gaps between the rows of x and W."""
    rows, inner, columns = shape
    x, weight = normal(rows, inner + 3).to(dtype)[:, :inner], normal(columns, inner + 5).to(dtype)[:, :inner]
    bias = normal(columns) if activation != "relu2" else None
    with launch.assume(launch.Target(90, 5)):
        y, pre = gemm.layer(x, weight, bias, activation, True, SMALL_BLOCKS)
        alone, nothing = gemm.layer(x, weight, bias, activation, False, SMALL_BLOCKS)
    assert torch.equal(y, alone)
    assert nothing.numel() == 0

    def reference(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        made = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return activate(made, None if activation == "none" else activation), made

    eager, exact = reference(x, weight), reference(x.double(), weight.double())
    for a, e, d, name in zip((y, pre), eager, exact, ("y", "pre"), strict=True):
        numerics.assert_close(a, e, d, numerics.FORWARD, name)


@pytest.mark.parametrize("keep", [False, True])
def test_dense_layers_take_that_kernel_where_asked_to(keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    started, run = [], launch.run
    monkeypatch.setattr(launch, "run", lambda kernel, *rest: (started.append(kernel.__name__), run(kernel, *rest)))
    x, w1, b1, w2 = normal(40, 64).half(), normal(128, 64).half() / 8, normal(128), normal(16, 128).half() / 8
    calls = (
        (linear.linear_fwd, (x, w1, b1, "gelu", keep), 1),
        (mlp.mlp_fwd, (x, w1, b1, w2, None, "silu", keep), 2),
    )
    for function, arguments, products in calls:
        expected = function(*arguments)
        assert "_gemm" not in started
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gemm, "ENABLED", True)
            patch.setattr(gemm, "BLOCKS", {90: (SMALL_BLOCKS,)})
            made = function(*arguments)
            assert started.count("_gemm") == products
            started.clear()
            function(*(t.float() if isinstance(t, Tensor) else t for t in arguments))  # float32 stays with cuBLAS
            assert "_gemm" not in started
        started.clear()
        for a, e in zip(made, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=8 * torch.finfo(torch.float16).eps)


@pytest.mark.parametrize("width", [4097, 17000])
@pytest.mark.parametrize("mixed", [False, True])
def test_norms_of_wide_rows(width: int, mixed: bool) -> None:
    x, w, b, residual = normal(5, width), normal(width), normal(width), normal(5, width)
    if mixed:
        x = x.bfloat16()
    forward = (x, w, residual, 1e-6, torch.float32)
    y, s, rstd = native.rms_norm_fwd(*forward)
    assert_as_native(rms_norm.rms_norm_fwd(*forward), (y, s, rstd), "rms_norm")
    backward = (y, y, s, w, rstd, False)
    with launch.assume(launch.Target(90, 1)):  # two programs, of several rows each
        assert_as_native(rms_norm.rms_norm_bwd(*backward), native.rms_norm_bwd(*backward), "rms_norm gradient")
    forward = (x, w, b, residual, 1e-5, torch.float32)
    y, s, mean, rstd = native.layer_norm_fwd(*forward)
    assert_as_native(layer_norm.layer_norm_fwd(*forward)[:2], (y, s), "layer_norm")
    backward = (y, None, s, w, mean, rstd, False)
    with launch.assume(launch.Target(90, 1)):
        assert_as_native(layer_norm.layer_norm_bwd(*backward), native.layer_norm_bwd(*backward), "layer_norm gradient")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_by_several_chunks(reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_cross_entropy, "LOGITS_BYTES", (33 * 4 * 4, 33 * 4 * 4))
    assert linear_cross_entropy.chunk_tokens(33, 17, 4) == 4
    x, w, b = normal(10, 17), normal(33, 17), normal(33)
    target = torch.randint(33, (10,), generator=generator)
    target[3] = -100
    call = (x, w, b, target, -100, 0.1, 5.0, reduction)
    wants = [reduction != "none"] * 3
    made = linear_cross_entropy.linear_cross_entropy_fwd(*call, wants)
    assert_as_native(made, native.linear_cross_entropy_fwd(*call, wants), "loss and gradients")
    backward = (normal(10) if reduction == "none" else torch.tensor(0.7), *call, [True, True, False])
    made = linear_cross_entropy.linear_cross_entropy_bwd(*backward)
    assert_as_native(made, native.linear_cross_entropy_bwd(*backward), "gradients")


def test_softcap_far_above_the_logits() -> None:
    """Where tanh is nearly its argument, which must keep its digits."""
    call = (normal(4, 50), torch.arange(4), -100, 0.0, 1000.0, "none")
    assert_as_native(cross_entropy.cross_entropy_fwd(*call)[:1], native.cross_entropy_fwd(*call)[:1], "loss")


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_scaling_gradients_that_are_made(factor: float) -> None:
    gradients = [normal(7, 11), normal(5000)]
    expected = [g * factor for g in gradients]
    linear_cross_entropy.scale_gradients(gradients, torch.tensor(factor))
    assert all(torch.equal(a, e) for a, e in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("maximize", [False, True])
def test_adamw(maximize: bool) -> None:
    """Tensors of several sizes and two dtypes, one of them behind an unaligned address, at two different steps."""
    sizes = (1, 3, 2048, 5000, 0, 2049)

    def tensors(scale: float = 1.0) -> list[Tensor]:
        made = [normal(n + 1)[1:] * scale for n in sizes]
        return [t.bfloat16() if i == 3 else t for i, t in enumerate(made)]

    params, grads, m, v = tensors(), tensors(), tensors(0.1), [t.square() for t in tensors(0.1)]
    steps = [3, 3, 3, 3, 3, 7]
    numbers = (1e-2, 0.9, 0.99, 1e-8, 0.1, maximize, 0.75, False)
    ours, theirs = ([[t.clone() for t in ts] for ts in (params, grads, m, v)] for _ in range(2))
    optim.adamw_(*ours, steps, *numbers)
    native.adamw_(*theirs, steps, *numbers)
    for i in (0, 2, 3):
        for a, e in zip(ours[i], theirs[i], strict=True):
            limit = numerics.ULPS * torch.finfo(a.dtype).eps * numerics.largest(e)
            assert numerics.max_error(a, e.double()) <= limit


def test_adamw_rounds_stochastically() -> None:
    """Every number goes to one of its two neighbours in bfloat16, and their mean to the number itself."""
    count = 20_000
    p, g, m, v = (torch.full((count,), x) for x in (1.0, 0.3, 0.1, 0.2))
    narrow = [t.bfloat16() for t in (p, m, v)]
    numbers = (1e-3, 0.9, 0.999, 1e-8, 0.0, False, 1.0)
    start = [t.float() for t in narrow]
    optim.adamw_([narrow[0]], [g], [narrow[1]], [narrow[2]], [2], *numbers, True)
    exact = [t.clone() for t in start]
    native.adamw_([exact[0]], [g], [exact[1]], [exact[2]], [2], *numbers, False)
    for rounded, number in zip(narrow, exact, strict=True):
        values = rounded.float().unique()
        assert len(values) == 2
        assert values[0] < number[0] < values[1]
        spacing = (values[1] - values[0]).item()
        assert abs(rounded.float().mean() - number[0]) < 4 * spacing / count**0.5


SGDS = {
    "plain": (1e-2, 0.0, 0.0, 0.1, False, False),
    "momentum": (1e-2, 0.9, 0.3, 0.1, False, False),
    "nesterov": (1e-2, 0.9, 0.0, 0.1, True, True),
}


@pytest.mark.parametrize("numbers", SGDS.values(), ids=SGDS)
def test_sgd(numbers: tuple) -> None:
    """As test_adamw, with one tensor at its first step: as near to float64 as torch's own SGD in float32 is."""
    lr, momentum, dampening, decay, nesterov, maximize = numbers
    sizes = (1, 3, 2048, 5000, 0, 2049)
    params, grads, buffers = ([normal(n + 1)[1:] for n in sizes] for _ in range(3))
    for tensors in (params, grads, buffers):
        tensors[3] = tensors[3].half()

    def torchs(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in params]
        options = {"momentum": momentum, "dampening": dampening, "weight_decay": decay, "nesterov": nesterov}
        optimizer = torch.optim.SGD(leaves, lr, maximize=maximize, foreach=False, **options)
        for i, p in enumerate(leaves):
            p.grad = grads[i].to(dtype)
            if momentum and i < 5:
                optimizer.state[p]["momentum_buffer"] = buffers[i].to(dtype, copy=True)
        optimizer.step()
        return [p.detach() for p in leaves], [optimizer.state[p]["momentum_buffer"] for p in leaves if momentum]

    eager, exact = torchs(torch.float32), torchs(torch.float64)
    ours = [t.clone() for t in params], [t.clone() for t in buffers if momentum]
    optim.sgd_(ours[0], grads, ours[1], [2, 2, 2, 2, 2, 1] if momentum else [], *numbers)
    for made, single, double in zip(ours, eager, exact, strict=True):
        for a, s, e in zip(made, single, double, strict=True):
            numerics.assert_close(a, s.to(a.dtype), e, numerics.FORWARD, "parameter or buffer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("width", [7, 600])
def test_embedding_of_classes_with_many_tokens(dtype: torch.dtype, width: int) -> None:
    """Stretches that begin, end and lie within blocks, whole blocks, tokens that are no class; the same bits twice."""
    counts = {0: 100, 1: 300, 3: 1, 4: 128, 5: 127, 6: 400, -7: 3, 9: 2, 2**40: 1}
    token = torch.cat([torch.full((n,), c) for c, n in counts.items()])
    token = token[torch.randperm(token.numel(), generator=generator)]
    grad = normal(token.numel(), width + 3).to(dtype)[:, :width]
    made = embedding.embedding_bwd(grad, token, 9, dtype)
    valid = (token >= 0) & (token < 9)
    exact, eager = (torch.zeros(9, width, dtype=d).index_add_(0, token[valid], grad[valid].to(d))
                    for d in (torch.float64, torch.float32))  # fmt: skip
    numerics.assert_close(made, eager.to(dtype), exact, numerics.BACKWARD, "gradient")
    assert torch.equal(made, embedding.embedding_bwd(grad, token, 9, dtype))
    table = normal(9, width).to(dtype)
    out = embedding.embedding_fwd(token, table)
    assert torch.equal(out[valid], table[token[valid]])
    assert out[~valid].isnan().all()


@pytest.mark.parametrize("most", [0.5, 1e9])
def test_clipping(most: float) -> None:
    grads = [normal(5), normal(3000), normal(7).bfloat16()]
    clipped = [g.clone() for g in grads]
    norm = optim.clip_grad_norm(clipped, most)
    expected = native.grad_norm(grads)
    assert norm.dtype is torch.float32
    torch.testing.assert_close(norm.item(), expected)
    for before, after in zip(grads, clipped, strict=True):
        torch.testing.assert_close(after, before * min(1.0, most / expected))

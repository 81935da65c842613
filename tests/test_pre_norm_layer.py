"""pre_norm_layer: a layer from one norm to the next as one function to autograd, beside the operators it is made of."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numerics
import pytest
import torch
import torch.nn.functional as F
from compare import assert_same
from torch import Tensor

import bigmodel_fast as bmf
from bigmodel_fast import _dispatch
from bigmodel_fast.ops._pre_norm_layer import Shape, Weights, pre_norm_layer

B, S, WIDTH, HEADS, HIDDEN = 3, 21, 32, 4, 72
DIM = WIDTH // HEADS
RESULTS = ("normed", "stream", "d normed", "d stream", *(f"d {name}" for name in Weights._fields))
SHAPES = {
    "gpt2": Shape(HEADS, DIM, is_causal=True, activation="gelu_tanh", rms=False, eps=1e-5, eps_after=1e-3),
    "modern": Shape(HEADS, DIM, is_causal=True, activation="silu", rms=True, eps=1e-6, eps_after=1e-3),
    "vit": Shape(HEADS, DIM, is_causal=False, activation="gelu", rms=False, eps=1e-6, eps_after=1e-6),
}
KINDS = {  # dtypes of normed, stream and weights
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "bf16, float32 stream and weights": (torch.bfloat16, torch.float32, torch.float32),
    "autocast": (torch.bfloat16, torch.float32, torch.float32),
    "autocast, bf16 stream": (torch.bfloat16, torch.bfloat16, torch.float32),
}
Rotation = tuple[Tensor, Tensor] | None
Layer = Callable[[Tensor, Tensor, Weights, Shape, Rotation], tuple[Tensor, Tensor] | None]


def make_weights(layout: str, dtype: torch.dtype = torch.float32) -> Weights:
    """Of two heads of keys and values for four of queries in the modern layout."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / 6).to(dtype).requires_grad_()

    modern = layout == "modern"
    qkv, out, up, down = draw((2 if modern else 3) * WIDTH, WIDTH), *map(draw, *zip(*SIZES, strict=True))
    biases = [None] * 4 if modern else [draw(len(w)) for w in (qkv, out, up, down)]
    norms = [None if modern and i % 2 else draw(WIDTH) for i in range(4)]
    return Weights(qkv, out, draw(HIDDEN, WIDTH) if modern else None, up, down, *biases, *norms)  # type: ignore[arg-type]


SIZES = ((WIDTH, WIDTH), (HIDDEN, WIDTH), (WIDTH, HIDDEN))  # of the matrices behind qkv


def rotation_of(layout: str, tokens: int) -> Rotation:
    if layout != "modern":
        return None
    angle = torch.arange(tokens)[:, None] * torch.linspace(1, 0.1, DIM // 2).repeat(2)
    return angle.cos(), angle.sin()


def queries_keys_values(qkv: Tensor, w: Weights) -> tuple[Tensor, ...]:
    heads = qkv.unflatten(-1, (-1, DIM)).transpose(1, 2)
    keys = (heads.shape[1] - HEADS) // 2
    return heads.split([HEADS, keys, keys], dim=1)


def by_operators(normed: Tensor, stream: Tensor, w: Weights, shape: Shape, rotation: Rotation) -> tuple[Tensor, Tensor]:
    ops = bmf.ops

    def norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float):
        if shape.rms:
            return ops.rms_norm(x, weight, eps=eps, residual=residual)
        return ops.layer_norm(x, weight, bias, eps=eps, residual=residual)

    q, k, v = queries_keys_values(ops.linear(normed, w.qkv, w.qkv_bias), w)
    if rotation is not None:
        q, k = ops.rotary(q, k, *rotation)
    y = ops.attention(q, k, v, is_causal=shape.is_causal, enable_gqa=True).transpose(1, 2).flatten(2)
    normed, stream = norm(ops.linear(y, w.out, w.out_bias), stream, w.norm, w.norm_bias, shape.eps)
    if w.gate is None:
        y = ops.mlp(normed, w.up, w.up_bias, w.down, w.down_bias, activation=shape.activation)
    else:
        y = ops.gated_mlp(normed, w.gate, w.up, w.down, activation=shape.activation)
    return norm(y, stream, w.norm_after, w.norm_after_bias, shape.eps_after)


def plain_layer(normed: Tensor, stream: Tensor, w: Weights, shape: Shape, rotation: Rotation) -> tuple[Tensor, Tensor]:
    """Plain torch; products in normed's dtype."""
    dtype = normed.dtype

    def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))

    def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        x, weight = x.to(torch.promote_types(x.dtype, weight.dtype)), weight.to(x.dtype)
        if shape.rms:
            return F.rms_norm(x, (WIDTH,), weight.to(x.dtype), eps).to(dtype)
        return F.layer_norm(x, (WIDTH,), weight.to(x.dtype), None if bias is None else bias.to(x.dtype), eps).to(dtype)

    def rotate(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = t.chunk(2, dim=-1)
        return (t * cos + torch.cat([-second, first], dim=-1) * sin).to(dtype)

    q, k, v = queries_keys_values(dense(normed, w.qkv, w.qkv_bias), w)
    if rotation is not None:
        q, k = rotate(q, *rotation), rotate(k, *rotation)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=shape.is_causal, enable_gqa=True).transpose(1, 2).flatten(2)
    stream = stream + dense(y, w.out, w.out_bias)
    normed = norm(stream, w.norm, w.norm_bias, shape.eps)
    hidden = dense(normed, w.up, w.up_bias)
    if w.gate is None:
        hidden = F.gelu(hidden, approximate="tanh" if shape.activation == "gelu_tanh" else "none")
    else:
        hidden = F.silu(dense(normed, w.gate, None)) * hidden
    stream = stream + dense(hidden, w.down, w.down_bias)
    return norm(stream, w.norm_after, w.norm_after_bias, shape.eps_after), stream


def results(layer: Layer, layout: str, kind: str, tokens: tuple[int, int] = (B, S), exact: bool = False):
    """Both outputs, and the gradients of both inputs and of all weights (None where there is none)."""
    dtypes = [torch.float64] * 3 if exact else KINDS[kind]
    w, generator = make_weights(layout, dtypes[2]), torch.Generator().manual_seed(0)

    def draw(dtype: torch.dtype) -> Tensor:
        return torch.randn((*tokens, WIDTH), generator=generator, dtype=torch.float64).to(dtype)

    normed, stream = (draw(dtype).requires_grad_() for dtype in dtypes[:2])
    with torch.autocast("cpu", torch.bfloat16, enabled=kind.startswith("autocast") and not exact):
        outputs = layer(normed, stream, w, SHAPES[layout], rotation_of(layout, tokens[1]))
    assert outputs is not None
    given = [t for t in (normed, stream, *w) if t is not None]
    grads = iter(torch.autograd.grad(outputs, given, [draw(y.dtype) for y in outputs]))
    return [*(y.detach() for y in outputs), *(None if t is None else next(grads) for t in (normed, stream, *w))]


@pytest.mark.parametrize("tokens", [(B, S), (1, 1)])
@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_as_the_operators(kind: str, layout: str, tokens: tuple[int, int]) -> None:
    bmf.explain(reset=True)
    with _dispatch.forcing("native"):  # whatever the size
        found = results(pre_norm_layer, layout, kind, tokens)
        assert [(c.op, c.path) for c in bmf.explain().calls] == [("pre_norm_layer", "native")]
        expected = results(by_operators, layout, kind, tokens)
    for name, a, b in zip(RESULTS, found, expected, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            assert_same([a], [b], name)


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16, float32 stream and weights"])
def test_as_near_as_eager(kind: str, layout: str) -> None:
    found, eager = results(pre_norm_layer, layout, kind), results(plain_layer, layout, kind)
    exact = results(plain_layer, layout, kind, exact=True)
    for name, a, e, c in zip(RESULTS, found, eager, exact, strict=True):
        if a is not None:
            if kind.startswith("bf16"):  # computed in it, whatever the tensor is
                a, e = a.bfloat16(), e.bfloat16()
            numerics.assert_close(a, e, c, numerics.BACKWARD, name)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(B, S, WIDTH), torch.randn(B, S, WIDTH)


@contextmanager
def kept() -> Iterator[dict[int, int]]:
    """Bytes that are kept for backward, by address."""
    sizes: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        yield sizes


@pytest.mark.parametrize("layout", SHAPES)
def test_frozen_weights_and_evaluation(layout: str) -> None:
    """What needs no gradient gets none; without gradients the outputs are the same and nothing is kept."""
    w, rotation = make_weights(layout), rotation_of(layout, S)
    frozen = ("qkv", "down", "norm_after")
    for name in frozen:
        getattr(w, name).requires_grad_(False)
    given = inputs()
    outputs = pre_norm_layer(*given, w, SHAPES[layout], rotation)
    assert outputs is not None
    (outputs[0].square().sum() + outputs[1].sum()).backward()
    expected = make_weights(layout)
    y, s = by_operators(*given, expected, SHAPES[layout], rotation)
    (y.square().sum() + s.sum()).backward()
    for name, a, b in zip(Weights._fields, w, expected, strict=True):
        if a is not None and b is not None:
            assert (a.grad is None) == (name in frozen), name
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad)
    with torch.no_grad(), kept() as sizes:
        again = pre_norm_layer(*given, w, SHAPES[layout], rotation)
    assert again is not None
    assert not sizes
    assert_same(again, [t.detach() for t in outputs], layout)


@pytest.mark.parametrize("trained", ["norm_after_bias", "down", "up_bias", "norm"])
def test_attention_that_learns_nothing_keeps_nothing(trained: str) -> None:
    """The operators run where backward ends before it comes to attention."""
    w = make_weights("gpt2")
    for t in w:
        if t is not None:
            t.requires_grad_(False)
    assert pre_norm_layer(*inputs(), w, SHAPES["gpt2"]) is not None
    getattr(w, trained).requires_grad_()
    assert pre_norm_layer(*inputs(), w, SHAPES["gpt2"]) is None
    w.out_bias.requires_grad_()  # type: ignore[union-attr]
    assert pre_norm_layer(*inputs(), w, SHAPES["gpt2"]) is not None


def test_biases_changed_before_backward() -> None:
    w, given = make_weights("gpt2"), inputs()
    outputs = [layer(*given, w, SHAPES["gpt2"], None)[0] for layer in (pre_norm_layer, by_operators)]  # type: ignore[index]
    with torch.no_grad():
        for name, t in w._asdict().items():
            if name.endswith("bias"):
                t.add_(1)
    found, expected = (torch.autograd.grad(y.cos().sum(), w.qkv) for y in outputs)
    assert_same(found, expected, "qkv")


@pytest.mark.parametrize("which", [0, 1])
def test_a_gradient_of_one_output_alone(which: int) -> None:
    w, given = make_weights("gpt2"), [t.requires_grad_() for t in inputs()]
    found, expected = (
        torch.autograd.grad(
            layer(*given, w, SHAPES["gpt2"], None)[which].cos().sum(), [*given, w.qkv, w.norm_after], allow_unused=True
        )
        for layer in (pre_norm_layer, by_operators)
    )
    torch.testing.assert_close(found, expected)


def test_outputs_changed_in_place() -> None:
    """The normed one may be; the stream is kept for backward, which complains."""
    w, given = make_weights("gpt2"), inputs()
    expected, _ = pre_norm_layer(*given, w, SHAPES["gpt2"])  # type: ignore[misc]
    y, stream = pre_norm_layer(*given, w, SHAPES["gpt2"])  # type: ignore[misc]
    y.mul_(2)
    assert_same(torch.autograd.grad(y.sum(), w.up), torch.autograd.grad(expected.mul(2).sum(), w.up), "up")
    y, stream = pre_norm_layer(*given, w, SHAPES["gpt2"])  # type: ignore[misc]
    stream.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


CASES = ["float64", "mixed weights", "a subclass", "not contiguous", "columns", "no tokens", "another width"]


@pytest.mark.parametrize("case", [*CASES, "another stream", "two dimensions", "a float32 norm under autocast"])
def test_left_to_the_operators(case: str) -> None:
    (normed, stream), w = inputs(), make_weights("gpt2")
    assert pre_norm_layer(normed, stream, w, SHAPES["gpt2"]) is not None
    if case == "float64":
        normed, stream, w = normed.double(), stream.double(), make_weights("gpt2", torch.float64)
    elif case == "mixed weights":
        w = w._replace(up=w.up.bfloat16())
    elif case == "a subclass":
        w = w._replace(norm=w.norm.detach().as_subclass(type("Other", (Tensor,), {})))
    elif case == "not contiguous":
        normed, stream = normed.transpose(0, 1), stream.transpose(0, 1)
    elif case == "columns":
        w = w._replace(up=w.up.detach().t().contiguous().t())
    elif case == "no tokens":
        normed, stream = normed[:0], stream[:0]
    elif case == "another width":
        normed, stream = normed[..., :16].contiguous(), stream[..., :16].contiguous()
    elif case == "another stream":
        stream = stream[:1]
    elif case == "two dimensions":
        normed, stream = normed[0], stream[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=case.endswith("autocast")):
        assert pre_norm_layer(normed, stream, w, SHAPES["gpt2"]) is None


@pytest.mark.parametrize("layout", SHAPES)
@pytest.mark.parametrize("name", Weights._fields)
def test_weights_of_another_size(name: str, layout: str) -> None:
    """Kernels would read beyond them; operators say what is wrong."""
    w, rotation = make_weights(layout), rotation_of(layout, S)
    t = getattr(w, name)
    if t is None:
        pytest.skip("not in this layout")
    for dim in range(t.dim()):
        for other in (torch.cat([t, t], dim), t.narrow(dim, 0, t.shape[dim] - 1).contiguous()):
            wrong = w._replace(**{name: other})
            assert pre_norm_layer(*inputs(), wrong, SHAPES[layout], rotation) is None
            with pytest.raises((RuntimeError, ValueError)):
                by_operators(*inputs(), wrong, SHAPES[layout], rotation)


def test_rotations() -> None:
    """Too short a one is the operator's error; gradients of one are the operators' too."""
    w, rotation = make_weights("modern"), rotation_of("modern", S)
    assert rotation is not None
    assert pre_norm_layer(*inputs(), w, SHAPES["modern"], (rotation[0][1:], rotation[1][1:])) is None
    rotation[1].requires_grad_()
    assert pre_norm_layer(*inputs(), w, SHAPES["modern"], rotation) is None

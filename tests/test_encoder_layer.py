"""encoder_layer: a whole encoder layer as one function to autograd, beside the operators it is made of."""

from collections.abc import Callable

import numerics
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bigmodel_fast as bmf
from bigmodel_fast.models.layers import EncoderLayer, LayerShape
from bigmodel_fast.ops._encoder_layer import Shape, Weights, encoder_layer

B, S, WIDTH, HEADS, HIDDEN = 3, 21, 32, 4, 72
SHAPE = Shape(WIDTH // HEADS, 0.3, "gelu", 1e-5, 1e-3, 0.0, 0.0, 0.0)
LENGTHS = torch.tensor([21, 5, 12])
STARTS = F.pad(LENGTHS.cumsum(0), (1, 0))
RESULTS = ("output", "x", *Weights._fields)
Layer = Callable[..., Tensor | None]


def make_weights(dtype: torch.dtype = torch.float32) -> Weights:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) / 6).to(dtype).requires_grad_()

    matrices = [draw(WIDTH, WIDTH) for _ in range(4)] + [draw(HIDDEN, WIDTH), draw(WIDTH, HIDDEN)]
    return Weights(*matrices, *(draw(len(w)) for w in matrices), *(draw(WIDTH) for _ in range(4)))


def plain_layer(
    x: Tensor, w: Weights, shape: Shape, starts: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """Plain torch, of the dtypes that autocast chooses; packed sequences one after the other."""
    if starts is not None:
        parts = x.squeeze(0).split(starts.diff().tolist())
        return torch.cat([plain_layer(part[None], w, shape)[0] for part in parts]).view(x.shape)

    def heads(weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, weight, bias).unflatten(2, (-1, shape.head_dim)).transpose(1, 2)

    q, k, v = heads(w.query, w.query_bias), heads(w.key, w.key_bias), heads(w.value, w.value_bias)
    mask = None if lengths is None else (torch.arange(x.shape[1]) < lengths[:, None])[:, None, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=shape.scale).transpose(1, 2).flatten(2)
    with torch.autocast("cpu", enabled=False):
        add = x + F.linear(y, w.out.to(y.dtype), w.out_bias.to(y.dtype)).to(x.dtype)
        x = F.layer_norm(add, (WIDTH,), w.norm1, w.norm1_bias, shape.eps1)
    y = F.linear(F.gelu(F.linear(x, w.up, w.up_bias)), w.down, w.down_bias)
    with torch.autocast("cpu", enabled=False):
        return F.layer_norm(x + y.to(x.dtype), (WIDTH,), w.norm2, w.norm2_bias, shape.eps2)


def results(layer: Layer, dtype: torch.dtype, autocast: bool, tokens: str, shape: Shape = SHAPE) -> list[Tensor]:
    """Output, and the gradients of x and of all weights."""
    w, generator = make_weights(dtype), torch.Generator().manual_seed(0)
    size = {"packed": (1, int(STARTS[-1]), WIDTH), "one": (1, 1, WIDTH)}.get(tokens, (B, S, WIDTH))
    x = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    options = {"packed": {"starts": STARTS}, "padded": {"lengths": LENGTHS}}.get(tokens, {})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x, w, shape, **options)
    assert y is not None
    upstream = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, [x, *w], upstream)]


def scale_of(name: str, expected: list[Tensor]) -> float | None:
    """The gradient of the keys' bias is 0 but for rounding: adding to all scores of a query changes no weight."""
    return numerics.largest(expected[RESULTS.index("query_bias")]) if name == "key_bias" else None


def first_tokens(y: Tensor, starts: Tensor | None) -> Tensor:
    return y[:, :1] if starts is None else y[:, starts[:-1]]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("tokens", ["full", "padded", "packed", "one"])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "autocast"])
def test_as_near_as_eager(kind: str, tokens: str, first: bool) -> None:
    """Of all tokens, or where only the first ones of sequences are asked for."""

    def ours(*args, **options) -> Tensor | None:
        return encoder_layer(*args, **options, first=first)

    def plain(*args, **options) -> Tensor:
        y = plain_layer(*args, **options)
        return first_tokens(y, options.get("starts")) if first else y

    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    bmf.explain(reset=True)
    found = results(ours, dtype, kind == "autocast", tokens)
    name = "encoder_layer_varlen" if tokens == "packed" else "encoder_layer"
    assert [(c.op, c.path) for c in bmf.explain().calls] == [(name, "native")]
    eager, exact = results(plain, dtype, kind == "autocast", tokens), results(plain, torch.float64, False, tokens)
    for name, a, e, c in zip(RESULTS, found, eager, exact, strict=True):
        if kind == "autocast":  # computed in it, though the tensors are float32
            a, e = a.bfloat16(), e.bfloat16()
        numerics.assert_close(a, e, c, numerics.BACKWARD, name, scale_of(name, exact))


def by_operators(x: Tensor, w: Weights, shape: Shape, starts: Tensor | None = None, **_: Tensor) -> Tensor:
    """The same by the operators, which draw other seeds for dropout."""
    tokens = x.squeeze(0)
    q, k, v = (
        bmf.ops.linear(tokens, weight, bias).unflatten(1, (-1, shape.head_dim))
        for weight, bias in ((w.query, w.query_bias), (w.key, w.key_bias), (w.value, w.value_bias))
    )
    p, p1, p2 = shape[-3:]
    y = bmf.ops.attention_varlen(q, k, v, starts, starts, scale=shape.scale, dropout_p=p).flatten(1)
    tokens = bmf.ops.linear(y, w.out, w.out_bias, dropout_p=p1, residual=tokens)
    with torch.autocast("cpu", enabled=False):
        tokens = bmf.ops.layer_norm(tokens, w.norm1, w.norm1_bias, eps=shape.eps1)
    tokens = bmf.ops.mlp(tokens, w.up, w.up_bias, w.down, w.down_bias, dropout_p=p2, residual=tokens)
    with torch.autocast("cpu", enabled=False):
        return bmf.ops.layer_norm(tokens, w.norm2, w.norm2_bias, eps=shape.eps2).view(x.shape)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("where", ["attention_dropout", "dropout1", "dropout2"])
def test_dropout(where: str, autocast: bool, monkeypatch) -> None:
    """The choices of forward are made again in backward: the gradients are those of operators given the same seed."""
    seed = torch.tensor([12345])

    def draw(high: int, size: tuple[int, ...], **options) -> Tensor:
        return seed.expand(size).clone()

    monkeypatch.setattr(torch, "randint", draw)
    shape = SHAPE._replace(**{where: 0.3})
    found, expected, dry = (
        results(f, torch.float32, autocast, "packed", s)
        for f, s in ((encoder_layer, shape), (by_operators, shape), (encoder_layer, SHAPE))
    )
    assert not torch.allclose(found[0], dry[0], atol=0.05)
    for name, a, b in zip(RESULTS, found, expected, strict=True):
        tolerance = (0.02 if autocast else 1e-5) * (scale_of(name, expected) or numerics.largest(b))
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0, msg=lambda m, name=name: f"{name}: {m}")


def test_frozen_weights_and_evaluation() -> None:
    """What needs no gradient gets none; without gradients nothing is kept, and the output is the same."""
    w = make_weights()
    for t in (w.query, w.up_bias, w.norm1):
        t.requires_grad_(False)
    x = torch.randn(B, S, WIDTH)
    y = encoder_layer(x, w, SHAPE)
    assert y is not None
    y.square().sum().backward()
    assert [n for n, t in zip(Weights._fields, w, strict=True) if t.grad is None] == ["query", "up_bias", "norm1"]
    with torch.no_grad():
        again = encoder_layer(x, w, SHAPE)
    assert torch.equal(y, again)  # type: ignore[arg-type]


def test_checkpointing() -> None:
    """Dropout included."""
    shape = SHAPE._replace(attention_dropout=0.1, dropout1=0.2, dropout2=0.3)
    found = []
    for run in (lambda f, *a: f(*a), lambda f, *a: checkpoint(f, *a, use_reentrant=False)):
        torch.manual_seed(0)
        w, x = make_weights(), torch.ones(B, S, WIDTH).cumsum(1).div(S).requires_grad_()
        y = run(encoder_layer, x, w, shape)
        found.append(torch.autograd.grad(y.cos().sum(), [x, *w]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_the_output_may_be_changed_in_place() -> None:
    w, x = make_weights(), torch.randn(B, S, WIDTH)
    y = encoder_layer(x, w, SHAPE)
    assert y is not None
    expected = torch.autograd.grad(y.mul(2).sum(), w.norm2_bias)
    again = encoder_layer(x, w, SHAPE)
    assert again is not None
    again.mul_(2)
    assert torch.equal(torch.autograd.grad(again.sum(), w.norm2_bias)[0], expected[0])


def test_wrong_input() -> None:
    w, x = make_weights(), torch.randn(1, 9, WIDTH)
    with pytest.raises(ValueError, match="starts must rise from 0 to the number of tokens, 9"):
        encoder_layer(x, w, SHAPE, starts=torch.tensor([0, 4]))
    with pytest.raises(TypeError, match="starts must be a tensor of int32 or int64"):
        encoder_layer(x, w, SHAPE, starts=torch.tensor([0.0, 9.0]))
    with pytest.raises(ValueError, match="lengths must have shape"):
        encoder_layer(x, w, SHAPE, lengths=torch.tensor([9, 9]))


CASES = ["float64", "mixed weights", "a subclass", "not contiguous", "columns", "everything dropped", "no tokens"]


@pytest.mark.parametrize("case", [*CASES, "another width", "no sequences"])
def test_left_to_the_operators(case: str) -> None:
    x, w, shape = torch.randn(B, S, WIDTH), make_weights(), SHAPE
    if case == "float64":
        x, w = x.double(), make_weights(torch.float64)
    elif case == "mixed weights":
        w = w._replace(up=w.up.bfloat16())
    elif case == "a subclass":
        w = w._replace(up=w.up.detach().as_subclass(type("Other", (Tensor,), {})))
    elif case == "not contiguous":
        x = x.transpose(0, 1)
    elif case == "columns":
        w = w._replace(up=w.up.detach().t().contiguous().t())
    elif case == "no tokens":
        x = x[:0]
    elif case == "another width":
        x = x[..., :16].contiguous()
    elif case == "no sequences":
        x = x[0]
    else:
        shape = shape._replace(dropout1=1.0)
    assert encoder_layer(x, w, shape) is None


@pytest.mark.parametrize("name", Weights._fields)
def test_weights_of_another_size(name: str) -> None:
    """Kernels would read beyond them; operators say what is wrong."""
    x, w = torch.randn(B, S, WIDTH), make_weights()
    t = getattr(w, name)
    for dim in range(t.dim()):
        for other in (torch.cat([t, t], dim), t.narrow(dim, 0, t.shape[dim] - 1).contiguous()):
            assert encoder_layer(x, w._replace(**{name: other}), SHAPE) is None


def test_biases_changed_before_backward() -> None:
    x, w = torch.randn(B, S, WIDTH), make_weights()
    expected, y = encoder_layer(x, w, SHAPE), encoder_layer(x, w, SHAPE)
    assert expected is not None
    assert y is not None
    before = torch.autograd.grad(expected.cos().sum(), w.query)
    with torch.no_grad():
        for name, t in w._asdict().items():
            if name.endswith("bias"):
                t.add_(1)
    assert torch.equal(torch.autograd.grad(y.cos().sum(), w.query)[0], before[0])


@pytest.mark.parametrize("packed", [False, True])
def test_models_use_it(packed: bool) -> None:
    """A post-norm layer of ours, unless one of its parts has hooks, which are called."""
    torch.manual_seed(0)
    layer, before = (
        EncoderLayer(LayerShape(WIDTH, HEADS, HIDDEN)),
        EncoderLayer(LayerShape(WIDTH, HEADS, HIDDEN, norm_first=True)),
    )
    x = torch.randn(26, WIDTH) if packed else torch.randn(2, 13, WIDTH)
    starts = torch.tensor([0, 9, 26], dtype=torch.int32) if packed else None
    bmf.explain(reset=True)
    y = layer(x, starts)
    name = "encoder_layer_varlen" if packed else "encoder_layer"
    assert {c.op for c in bmf.explain(reset=True).calls} == {name}
    before(x, starts)
    assert name not in {c.op for c in bmf.explain(reset=True).calls}
    seen: list[str] = []
    layer.norm1.register_forward_hook(lambda *_: seen.append("forward"))
    layer.norm2.register_full_backward_hook(lambda *_: seen.append("backward"))
    again = layer(x, starts)
    again.sum().backward()
    torch.testing.assert_close(again, y)
    assert seen == ["forward", "backward"]
    other = EncoderLayer(LayerShape(WIDTH, HEADS, HIDDEN))
    other.norm2 = torch.nn.Identity()  # type: ignore[assignment]
    bmf.explain(reset=True)
    other(x, starts)
    assert name not in {c.op for c in bmf.explain().calls}


def test_torch_func() -> None:
    """Its transforms get the operators one by one."""
    layer, x = EncoderLayer(LayerShape(WIDTH, HEADS, HIDDEN)), torch.randn(2, 13, WIDTH)
    found = torch.func.grad(lambda t: layer(t).cos().sum())(x)
    expected = torch.autograd.grad(layer(x.requires_grad_()).cos().sum(), x)[0]
    torch.testing.assert_close(found, expected)


def test_no_tokens() -> None:
    layer = EncoderLayer(LayerShape(WIDTH, HEADS, HIDDEN))
    assert layer(torch.randn(0, WIDTH), torch.tensor([0], dtype=torch.int32)).shape == (0, WIDTH)


def test_raw_operators() -> None:
    raw, checks = torch.ops.bigmodel_fast, ("test_schema", "test_faketensor")
    x, w, seed = torch.randn(7, 40), torch.randn(40), torch.tensor([5])
    torch.library.opcheck(raw.layer_norm_twice_fwd.default, (x, w, w, 1e-5), test_utils=checks)
    y, narrow, mean, rstd = raw.layer_norm_twice_fwd(x, w, w, 1e-5)
    assert torch.equal(y.bfloat16(), narrow)
    arguments = (y, None, x, w, mean, rstd, True, seed, 0.5)
    torch.library.opcheck(raw.layer_norm_bwd.default, arguments, test_utils=checks)
    grad, dropped, *_ = raw.layer_norm_bwd(*arguments)
    assert torch.equal(dropped, raw.dropout_fwd(grad, seed, 0.5, None, torch.bfloat16))
    up, down, pre = torch.randn(24, 40), torch.randn(40, 24), torch.randn(7, 24)
    given = (x, x, up, down, pre, "gelu", [True] * 5)
    torch.library.opcheck(raw.mlp_bwd.default, (*given, y), test_utils=checks)
    torch.testing.assert_close(raw.mlp_bwd(*given, y)[0], raw.mlp_bwd(*given)[0] + y)
    given = ([x], x, [torch.randn(40, 40)], torch.float32, [True, True, True])
    torch.library.opcheck(raw.linears_bwd.default, (*given, y), test_utils=checks)
    torch.testing.assert_close(raw.linears_bwd(*given, y)[0], raw.linears_bwd(*given)[0] + y)
    with pytest.raises(RuntimeError, match="dx_residual must be"):
        raw.linears_bwd(*given, y[:3])

"""bmf.accelerate on attention in plain torch by any name, and on look-alikes of it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from accelerated import DTYPES, B, E, H, S, as_float64, assert_same_model, draw, kinds, outputs_of, seeded
from torch import Tensor, nn

import bigmodel_fast as bmf

D = E // H


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """By hand: softmax(Q K^T / sqrt(D)) V."""
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(q.shape[2], k.shape[2]).triu(1).bool(), float("-inf"))
    return scores.softmax(-1) @ v


class Block(nn.Module):
    """One dense layer for queries, keys and values, then heads; as in timm."""

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = H, nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.weight_drop, self.out_drop, self.unused = nn.Dropout(p), nn.Dropout(p), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = self.weight_drop((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1))
        return self.out_drop(self.out((weights @ v).transpose(1, 2).reshape(x.shape)))


class Causal(nn.Module):
    """As in nanoGPT: torch's own function, causal, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(E, 3 * E, bias=False), nn.Linear(E, E, bias=False)
        self.n_head, self.n_embd = H, E

    def forward(self, x: Tensor) -> Tensor:
        heads = (*x.shape[:2], self.n_head, self.n_embd // self.n_head)
        q, k, v = (t.view(heads).transpose(1, 2) for t in self.c_attn(x).split(self.n_embd, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class Limited(Causal):
    """With a mask for 40 tokens at most."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.ones(1, 1, 40, 40).tril().bool())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).view(*x.shape[:2], 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT / math.sqrt(D)).masked_fill(~self.seen[:, :, : x.shape[1], : x.shape[1]], float("-inf"))
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))


class WithinHeads(Causal):
    """Queries, keys and values of a head together, as in GPT-NeoX."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).view(*x.shape[:2], self.n_head, 3, -1).permute(3, 0, 2, 1, 4)
        return self.c_proj(attend(q, k, v, causal=True).transpose(1, 2).reshape(x.shape))


class Four(nn.Module):
    """Four dense layers, in an order of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.value, self.key, self.query = (nn.Linear(E, E) for _ in range(4))
        self.h = H

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (t(x).unflatten(-1, (self.h, -1)).transpose(1, 2) for t in (self.query, self.key, self.value))
        if mask is not None:
            k = k + mask
        return self.last(attend(q, k, v).transpose(1, 2).flatten(2))


class Unscaled(Causal):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).view(*x.shape[:2], 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        return self.c_proj(attend(q * math.sqrt(D), k, v).transpose(1, 2).reshape(x.shape))


class Swapped(Causal):
    def forward(self, x: Tensor) -> Tensor:
        q, v, k = self.c_attn(x).view(*x.shape[:2], 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        return self.c_proj(attend(q, k, v).transpose(1, 2).reshape(x.shape))


class Residual(Causal):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


class Windowed(Causal):
    window = 1

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).view(*x.shape[:2], 3, self.n_head, -1).permute(2, 0, 3, 1, 4)
        near = torch.ones(x.shape[1], x.shape[1]).tril(self.window).triu(-self.window).bool()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class WideWindow(Windowed):
    window = 128


class WiderWindow(Windowed):
    def __init__(self) -> None:
        super().__init__()
        self.window = 512


class FarWindow(Windowed):
    def __init__(self) -> None:
        super().__init__()
        self.window = 4096


class ShortOnly(Causal):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 16:
            raise ValueError("too long")
        return super().forward(x)


class Noisy(Causal):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.1, self.training)


class DropsScores(Block):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        weights = self.weight_drop(q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(x.shape))


class DropsItsInput(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.unused(x))


UNKNOWN = "an attention's dense layers, but not an attention that is known"
LOOK_ALIKES = {
    Unscaled: UNKNOWN,
    Swapped: UNKNOWN,
    Residual: UNKNOWN,
    Windowed: UNKNOWN,
    WideWindow: UNKNOWN,
    WiderWindow: UNKNOWN,
    FarWindow: "what it does with many tokens cannot be tried",
    ShortOnly: "what it does with many tokens cannot be tried",
    Noisy: "drops by other means than its children",
    DropsScores: "a dropout where attention has none",
    DropsItsInput: "a dropout where attention has none",
}
X = draw(B, S, E)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", [Block, Causal, Limited, WithinHeads, Four], ids=lambda m: m.__name__)
def test_what_computes_attention_is_replaced(module: type, dtype: str) -> None:
    bmf.explain(reset=True)
    report, _ = assert_same_model(seeded(module), outputs_of(X), dtype)
    assert report.rows[0].accelerated
    assert module.__name__ in kinds(report)
    assert not report.left
    assert ("attention", "native") in {(c.op, c.path) for c in bmf.explain().calls}


@pytest.mark.parametrize("module", LOOK_ALIKES, ids=lambda m: m.__name__)
def test_a_look_alike_is_left_alone(module: type) -> None:
    model = seeded(module).eval()
    expected = model(X)
    left = {row.kind: row.why for row in bmf.accelerate(model).left}
    assert left == {module.__name__: LOOK_ALIKES[module]}
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)


def test_other_arguments_go_to_the_original() -> None:
    model = seeded(Four).eval()
    mask = draw(B, H, S, D)
    expected = model(X, mask), model(X, mask=mask)
    bmf.accelerate(model)
    for found, stock in zip((model(X, mask), model(X, mask=mask)), expected, strict=True):
        torch.testing.assert_close(found, stock, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_dropouts_are_where_they_were(bias: bool) -> None:
    model = seeded(Block, 0.3).train()
    model.out.bias = model.out.bias if bias else None
    fast = copy.deepcopy(model)
    bmf.accelerate(fast)
    x = as_float64(model, X[:1])[0].expand(3000, S, E)
    with torch.no_grad():
        (m1, s1), (m2, s2) = ((y.mean(0), y.std(0)) for y in (model(x), fast(x)))
    assert ((m1 - m2).abs() <= 5 * s1 * (2 / 3000) ** 0.5).all()
    torch.testing.assert_close(s1, s2, rtol=0.15, atol=0)


def test_each_layer_is_looked_at_that_differs_from_the_last() -> None:
    """In a number, in a mask, or in an object; two that are the same are looked at once."""
    layers = [Causal(), Causal(), Limited(), Limited(), Causal(), WiderWindow(), WiderWindow()]
    layers[3].seen[0, 0, 3, 1] = False
    layers[4].n_head = 2
    layers[6].window = 2
    found = {row.name: row.accelerated for row in bmf.accelerate(nn.ModuleList(layers)).rows if "." not in row.name}
    assert found == {str(i): i in (0, 1, 2, 4) for i in range(7)}
    torch.testing.assert_close(layers[4](X), bmf.restore(layers[4])(X), rtol=1e-4, atol=1e-5)


def test_hooks_within_are_called() -> None:
    model = seeded(Block).eval()
    bmf.accelerate(model)
    seen: list[int] = []
    model.qkv.register_forward_hook(lambda *_: seen.append(1))
    bmf.explain(reset=True)
    model(X)
    assert seen == [1]
    assert ("accelerate: Block", "qkv has hooks") in {(c.op, c.reason) for c in bmf.explain().calls}

"""linear_cross_entropy(return_accuracy=True): the share of tokens whose target has the highest logit."""

import pytest
import torch

import bigmodel_fast as bmf
from bigmodel_fast import ops
from bigmodel_fast.ops.linear_cross_entropy import reference

OPTIONS = ({}, {"reduction": "sum", "label_smoothing": 0.1}, {"reduction": "none", "ignore_index": 2}, {"softcap": 3.0})


def inputs(tokens: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight and targets of which about half are right."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(tokens, 24, generator=generator), torch.randn(classes, 24, generator=generator)
    best = (x @ weight.T).argmax(1)
    other = torch.randint(classes, (tokens,), generator=generator)
    return x, weight, torch.where(torch.rand(tokens, generator=generator) < 0.5, best, other)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("function", [ops.linear_cross_entropy, reference])
def test_counts_the_targets_with_the_highest_logit(function, options):
    x, weight, target = inputs(300, 67)
    ignored = options.get("ignore_index", -100)
    target[::7] = ignored
    used = target != ignored
    expected = (x @ weight.T).argmax(1)[used].eq(target[used]).double().mean()
    loss, accuracy = function(x, weight, target, return_accuracy=True, **options)
    assert torch.equal(loss, function(x, weight, target, **options))
    assert 0.3 < expected < 0.7
    assert accuracy.item() == pytest.approx(expected.item(), abs=1e-6)
    assert accuracy.dtype == torch.float32
    assert accuracy.shape == ()


def test_few_tokens_go_to_plain_torch_and_it_says_so(monkeypatch) -> None:
    monkeypatch.undo()
    x, weight, target = inputs(4, 9)
    bmf.explain(reset=True)
    ops.linear_cross_entropy(x[:3], weight, target[:3])
    ops.linear_cross_entropy(x, weight, target)
    calls = [c for c in bmf.explain(reset=True).calls if c.op == "linear_cross_entropy"]
    assert [(c.path, c.reason) for c in calls] == [("native", ""), ("reference", "fewer than 4 tokens")]


def test_has_no_gradient_and_leaves_the_loss_its_own():
    x, weight, target = inputs(50, 31)
    both = [t.clone().requires_grad_() for t in (x, weight)]
    loss, accuracy = ops.linear_cross_entropy(*both, target, return_accuracy=True)
    assert not accuracy.requires_grad
    loss.backward()
    alone = [t.clone().requires_grad_() for t in (x, weight)]
    ops.linear_cross_entropy(*alone, target).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(both, alone, strict=True))


def test_is_nan_where_no_token_counts():
    x, weight, target = inputs(5, 3)
    _, accuracy = ops.linear_cross_entropy(x, weight, torch.full_like(target, -100), return_accuracy=True)
    assert accuracy.isnan()


def test_compiles_without_a_graph_break():
    x, weight, target = inputs(40, 9)
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager")
    expected = ops.linear_cross_entropy(x, weight, target, return_accuracy=True)
    assert all(map(torch.equal, compiled(x, weight, target, return_accuracy=True), expected))

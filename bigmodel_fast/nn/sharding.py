"""Tensor parallelism: how operators work on DTensors whose parts several processes hold.

    register_sharding_rules()
    weight = distribute_tensor(weight, mesh, [Shard(0)])   # each process makes some of the outputs
    y = ops.linear(x, weight)                              # x is replicated; y is sharded by its last dimension

A rule says which placements of the arguments give which placements of the results, without communication; torch's
DTensor picks the one that moves the least, and brings arguments to it (Shoeybi et al. 2019 have these by hand).
"""

from collections.abc import Callable, Sequence
from typing import Any

from .. import ops  # noqa: F401  (the raw operators are there)

Placed = tuple[list[Any], list[Any]]  # placements of the outputs, and of each argument (None where it is no tensor)
_registered = False


def register_sharding_rules() -> None:
    """Has `ops.linear`, `mlp`, `gated_mlp` and `attention` take DTensors, without dropout; once is enough.

    linear takes weights sharded by outputs (Megatron's column parallel) or, without bias, residual and activation, by
    inputs (row parallel); mlp (without b2) and gated_mlp by hidden units; attention queries, keys and values by heads.
    All take inputs sharded by rows of the batch. Everything else is replicated first.
    """
    global _registered
    if _registered:
        return
    import torch
    from torch.distributed.tensor.experimental import register_sharding

    raw = torch.ops.bigmodel_fast
    rules: dict[Any, Callable[..., list[Placed]]] = {
        raw.linear_fwd.default: _linear_forward,
        raw.linear_bwd.default: _linear_backward,
        raw.mlp_fwd.default: _mlp_forward,
        raw.mlp_bwd.default: _mlp_backward,
        raw.gated_mlp_fwd.default: _gated_forward,
        raw.gated_mlp_bwd.default: _gated_backward,
        raw.attention_fwd.default: _attention_forward,
        raw.attention_bwd.default: _attention_backward,
    }
    for op, rule in rules.items():
        register_sharding(op)(rule)
    _registered = True


def _placements() -> tuple[Any, Any, Callable[[int], Any]]:
    from torch.distributed.tensor import Partial, Replicate, Shard

    return Replicate(), Partial(), Shard


def _given(arguments: Sequence[Any], placements: Sequence[Any], others: int) -> list[Any]:
    """Placements of the tensors that are there; None for those that are not, and for `others` more arguments."""
    kept = [None if a is None else p for a, p in zip(arguments, placements, strict=True)]
    return [*kept, *[None] * others]


def _linear_forward(x, weight, bias, activation, save_pre, residual=None, seed=None, dropout_p=0.0) -> list[Placed]:
    whole, partial, by = _placements()

    def case(y, pre, x_, weight_, bias_, residual_) -> Placed:
        first = _given((x, weight, bias), (x_, weight_, bias_), 2)
        return [y, pre], [*first, *_given((residual, seed), (residual_, whole), 1)]

    cases = [case(whole, whole, whole, whole, whole, whole)]
    if seed is None:
        cases.append(case(by(0), by(0), by(0), whole, whole, by(0)))
        cases.append(case(by(1), by(1), whole, by(0), by(0), by(1)))
    if seed is None and bias is None and residual is None and activation == "none":
        cases.append(case(partial, whole, by(1), by(1), None, None))
    return cases


def _linear_backward(dy, x, weight, pre, activation, wants) -> list[Placed]:
    whole, partial, by = _placements()
    cases: list[Placed] = [
        ([whole, whole, whole], [whole, whole, whole, whole, None, None]),
        ([by(0), partial, partial], [by(0), by(0), whole, by(0), None, None]),
        ([partial, by(0), by(0)], [by(1), whole, by(0), by(1), None, None]),
    ]
    if activation == "none":
        cases.append(([by(1), by(1), whole], [whole, by(1), by(1), whole, None, None]))
    return cases


def _mlp_forward(x, w1, b1, w2, b2, activation, save_pre, residual=None, seed=None, dropout_p=0.0) -> list[Placed]:
    whole, partial, by = _placements()

    def case(y, pre, *placed) -> Placed:
        first = _given((x, w1, b1, w2, b2), placed[:5], 2)
        return [y, pre], [*first, *_given((residual, seed), (placed[5], whole), 1)]

    cases = [case(whole, whole, *[whole] * 6)]
    if seed is None:
        cases.append(case(by(0), by(0), by(0), whole, whole, whole, whole, by(0)))
    if seed is None and b2 is None and residual is None:
        cases.append(case(partial, by(1), whole, by(0), by(0), by(1), None, None))
    return cases


def _mlp_backward(dy, x, w1, w2, pre, activation, wants) -> list[Placed]:
    whole, partial, by = _placements()
    return [
        ([whole] * 5, [*[whole] * 5, None, None]),
        ([by(0), *[partial] * 4], [by(0), by(0), whole, whole, by(0), None, None]),
        ([partial, by(0), by(0), by(1), whole], [whole, whole, by(0), by(1), by(1), None, None]),
    ]


def _gated_forward(x, w_gate, w_up, w_down, activation, save, residual=None, seed=None, dropout_p=0.0) -> list[Placed]:
    whole, partial, by = _placements()

    def case(outs, *placed) -> Placed:
        return outs, [*placed[:4], None, None, *_given((residual, seed), (placed[4], whole), 1)]

    cases = [case([whole] * 3, *[whole] * 5)]
    if seed is None:
        cases.append(case([by(0)] * 3, by(0), whole, whole, whole, by(0)))
    if seed is None and residual is None:
        cases.append(case([partial, by(1), by(1)], whole, by(0), by(0), by(1), None))
    return cases


def _gated_backward(dy, x, w_gate, w_up, w_down, gate, up, activation, wants) -> list[Placed]:
    whole, partial, by = _placements()
    return [
        ([whole] * 4, [*[whole] * 7, None, None]),
        ([by(0), *[partial] * 3], [by(0), by(0), whole, whole, whole, by(0), by(0), None, None]),
        ([partial, by(0), by(0), by(1)], [whole, whole, by(0), by(0), by(1), by(1), by(1), None, None]),
    ]


def _attention_cases(outputs: int, tensors: int, extra: Sequence[Any], rest: int) -> list[Placed]:
    """All of [B, H, ...] replicated, or, without anything beside queries, keys and values, sharded by B or H."""
    whole, _, by = _placements()
    cases: list[Placed] = [
        ([whole] * outputs, [*[whole] * tensors, *_given(extra, [whole] * len(extra), rest)]),
    ]
    if all(t is None for t in extra):
        for dim in (0, 1):
            cases.append(([by(dim)] * outputs, [*[by(dim)] * tensors, *[None] * (len(extra) + rest)]))
    return cases


def _attention_forward(query, key, value, *others) -> list[Placed]:
    return _attention_cases(2, 3, others[:6], len(others) - 6)


def _attention_backward(grad_out, query, key, value, out, stats, *others) -> list[Placed]:
    whole, _, _ = _placements()
    cases = _attention_cases(4, 6, others[:6], len(others) - 6)
    return [([*outs[:3], whole], placed) for outs, placed in cases]

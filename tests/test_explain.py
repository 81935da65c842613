"""explain(): what it counts, the reasons it gives, and its table."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import bigmodel_fast as bmf
from bigmodel_fast import _dispatch


def rows() -> list[tuple[str, str, str, int]]:
    return [(c.op, c.path, c.reason, c.count) for c in bmf.explain(reset=True).calls]


def test_counts_the_kernel_and_names_the_reason_for_the_reference() -> None:
    bmf.explain(reset=True)
    x, w = torch.randn(3, 8), torch.randn(5, 8)
    bmf.ops.linear(x, w)
    bmf.ops.linear(x, w)
    bmf.ops.linear(x.double(), w.double())
    assert rows() == [
        ("linear", "native", "", 2),
        ("linear", "reference", "no kernel for torch.float64", 1),
    ]


def test_table_has_a_row_per_path() -> None:
    bmf.explain(reset=True)
    assert str(bmf.explain()) == "no operator has been called yet"
    bmf.ops.linear(torch.randn(3, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64))
    header, row = str(bmf.explain(reset=True)).splitlines()
    assert header.split()[:3] == ["operator", "path", "calls"]
    assert row.split() == ["linear", "reference", "1", "no", "kernel", "for", "torch.float64"]


def test_says_that_a_cuda_kernel_was_never_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dispatch, "_native_cuda", {"attention"})
    with FakeTensorMode():
        query = torch.empty(2, dtype=torch.bfloat16, device="cuda")
    bmf.explain(reset=True)
    with _dispatch.forcing("native"):
        assert _dispatch.use_native("attention", None, query)
        assert not _dispatch.use_native("attention", "no kernel", query)
    assert rows() == [
        ("attention", "native", _dispatch.UNMEASURED, 1),
        ("attention", "reference", "no kernel", 1),
    ]

"""Every test starts from the instruction set and the thread count the process started with; small tensors meet the
kernels too, where a user's would go to plain torch because that is faster.
"""

import importlib

import pytest
import torch

import bigmodel_fast as bmf

dropout = importlib.import_module("bigmodel_fast.ops.dropout")


@pytest.fixture(autouse=True)
def _as_started(monkeypatch):
    monkeypatch.setattr(dropout, "FEWEST_ELEMENTS", 0)
    isa, threads = bmf.cpu_isa(), torch.get_num_threads()
    yield
    bmf.cpu_isa(isa)
    torch.set_num_threads(threads)

"""Every test starts from the instruction set and the thread count the process started with."""

import pytest
import torch

import bigmodel_fast as bmf


@pytest.fixture(autouse=True)
def _as_started():
    isa, threads = bmf.cpu_isa(), torch.get_num_threads()
    yield
    bmf.cpu_isa(isa)
    torch.set_num_threads(threads)

"""Every instruction set this machine has, forced by name, gives results within the same bounds."""

import os
import subprocess
import sys

import pytest
import torch
from compare import assert_matches
from specs import Spec, all_specs, case_id

import bigmodel_fast as bmf
from bigmodel_fast._library import supported_cpu_isas

ISAS = supported_cpu_isas()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=case_id)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("spec", all_specs(), ids=case_id)
def test_results(spec: Spec, isa: str, dtype: torch.dtype) -> None:
    assert bmf.cpu_isa(isa) == isa
    for sample in (spec.samples[1], spec.samples[-1], *map(spec.tail, (1, 5, 15, 31, 66))):
        assert_matches(spec, sample, sample.tensors(dtype), what=isa)


def test_generic_is_always_there() -> None:
    assert ISAS[0] == "generic"
    assert bmf.cpu_isa() in ISAS


def test_unknown_name() -> None:
    before = bmf.cpu_isa()
    with pytest.raises(ValueError, match=r"sse9.*generic"):
        bmf.cpu_isa("sse9")
    assert bmf.cpu_isa() == before


def started_with(isa: str) -> subprocess.CompletedProcess:
    code = "import torch, bigmodel_fast; print(bigmodel_fast.cpu_isa())"
    environment = {**os.environ, "BMF_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_environment_variable() -> None:
    assert started_with("generic").stdout.strip() == "generic"
    wrong = started_with("sse9")
    assert wrong.returncode != 0
    assert "BMF_CPU_ISA" in wrong.stderr.splitlines()[-1]

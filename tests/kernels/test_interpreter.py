"""The Triton kernels' numerics without a GPU: in Triton's interpreter, which runs them on CPU tensors.

It must be asked for before triton is imported, so the tests proper (interpreted*.py) run in processes of their own,
side by side, and this module only waits for them.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from specs import all_specs

from bigmodel_fast.ops import _triton

pytest.importorskip("triton")
HERE = Path(__file__).parent
ATTENTION = [spec.name for spec in all_specs() if spec.name.startswith("attention")]
OTHERS = [spec.name for spec in all_specs() if spec.name in _triton.PUBLIC and spec.name not in ATTENTION]
RUNS = {
    "attention": ("interpreted.py", ATTENTION),
    "operators": ("interpreted.py", OTHERS),
    "cases": ("interpreted_cases.py", []),
}


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen]]:
    started = {}
    for name, (file, operators) in RUNS.items():
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "1",
            "BMF_INTERPRETED": ",".join(operators),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", str(HERE / file)]
        started[name] = subprocess.Popen(
            command, env=environment, cwd=HERE.parents[1], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_interpreted(name: str, processes: dict[str, subprocess.Popen]) -> None:
    output, _ = processes[name].communicate(timeout=600)
    assert processes[name].returncode == 0, output

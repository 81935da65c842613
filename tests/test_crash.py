"""Runs that are killed at any instant go on with the same bits; BMF_KILLS=200 for more of them (see crash.py)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

for package in ("safetensors", "matplotlib", "yaml"):
    pytest.importorskip(package)

KILLS = int(os.environ.get("BMF_KILLS", "10"))


@pytest.mark.slow
def test_runs_that_are_killed_lose_nothing_and_go_on_with_the_same_bits() -> None:
    command = [sys.executable, str(Path(__file__).with_name("crash.py")), "--kills", str(KILLS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60 + 5 * KILLS)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert min(counts["mid-save"], counts["elsewhere"]) >= KILLS // 2
    assert counts["compared"] >= KILLS // 2

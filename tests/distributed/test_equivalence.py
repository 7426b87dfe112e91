"""N ranks with batch B/N take the step that one rank takes with batch B: gloo, float64, frozen or synchronised BatchNorm."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATHS = os.pathsep.join(str(path) for path in (ROOT, ROOT / "kernels"))


def torchrun(processes, *args, timeout=300, before=(), **environment):
    """Run ``python -m`` something on so many ranks; return the finished process."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        *before,
        "-m",
        *map(str, args),
    ]
    surroundings = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=surroundings, check=False)


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_take_the_step_of_one(ranks, tmp_path):
    done = torchrun(ranks, "tests.distributed.worker", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) > 30
    assert {case: difference for case, difference in found.items() if not difference <= 1e-10} == {}

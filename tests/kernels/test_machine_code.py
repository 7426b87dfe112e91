"""The kernels compiled ahead of time for GPUs that need not be here: every tile, in its most demanding variant."""

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
CAPABILITIES = (80, 90, 100)
KERNELS = {
    "loss",
    "loss with gradients",
    "combine",
    "gradients",
    "reduce",
    "tangent",
    "combine tangent",
    "tangent gradients",
    "reweight",
    "reweight gradients",
    "reweight dual",
    "reweight dual gradients",
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Compiled in a process of its own: an interpreted kernel cannot be compiled."""
    path = tmp_path_factory.mktemp("machine_code") / "results.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(["kernels", environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "benchmarks.machine_code", "--demanding", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_every_kernel_compiles_with_every_tile_and_spills_nothing(kernel, capability, results):
    mine = [result for result in results if (result["kernel"], result["sm"]) == (kernel, capability)]
    assert {result["dtype"] for result in mine} == {"bfloat16", "float32", "float64"}
    for result in mine:
        # None with Triton 3.8. Other versions' assemblers put one or two doubles aside to fit one more block on a
        # multiprocessor: float64 is for checks, so that may be.
        assert result["spilled_bytes"] <= (16 if result["dtype"] == "float64" else 0), result
        assert 0 < result["registers"] <= 255, result


def test_every_tile_of_the_table_is_among_them(results):
    blocks = {(result["dtype"], result["block"]) for result in results if result["kernel"] == "loss"}
    assert {block for dtype, block in blocks if dtype != "float64"} == {16, 32, 64, 128, 256, 512, 1024, 2048, 4096}
    assert {block for dtype, block in blocks if dtype == "float64"} == {16, 32, 64, 128, 256, 512, 1024}
    assert any(result["chunks"] > 1 for result in results)
    assert any(result["segments"] > 1 for result in results)


def test_aligned_rows_are_read_sixteen_bytes_at_a_time(results):
    listed = [result for result in results if "wide_accesses" in result]
    assert {result["kernel"] for result in listed} == KERNELS - {"combine", "combine tangent", "reduce"}
    assert all(result["wide_accesses"] >= 2 for result in listed)

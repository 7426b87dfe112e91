import platform
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own: the setting cannot be taken back.
CODE = """
import resource, sys
import torch
from fastadvisor.runtime.allocator import keep_freed_memory, return_freed_memory

if sys.argv[1] != "default":
    assert keep_freed_memory()
if sys.argv[1] == "return":
    return_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 * 2**20)  # 64 MiB, above any size glibc keeps of its own accord
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_memory_is_kept_between_steps():
    counts = {}
    for mode in ("keep", "default", "return"):
        run = subprocess.run([sys.executable, "-c", CODE, mode], capture_output=True, text=True, check=True)
        counts[mode] = int(run.stdout)
    assert counts["keep"] * 20 < counts["default"]
    assert counts["keep"] * 20 < counts["return"]


PEAKS = """
import torch
from fastadvisor.runtime import memory
from fastadvisor.runtime.allocator import keep_freed_memory

keep_freed_memory()
cpu = torch.device("cpu")
memory.reset_peak(cpu)
tensors = [torch.ones(2**20) for _ in range(100)]  # 400 MiB
pin = torch.ones(1000)  # above them in the heap, so that no top is trimmed
del tensors
first = memory.peak_mb(cpu)
memory.reset_peak(cpu)
print(first - memory.peak_mb(cpu))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_peak_of_one_run_is_not_the_next_ones():
    run = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True)
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the kernel does not let the peak be reset")
    assert float(run.stdout) > 300


def test_without_glibc_nothing_happens(monkeypatch):
    from fastadvisor.runtime import allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("touched the C library"))
    assert allocator.keep_freed_memory() is False

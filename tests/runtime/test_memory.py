import pytest
import torch

from fastadvisor.runtime import memory

CPU = torch.device("cpu")


def allocate_200_mb():
    return torch.ones(200, 2**18)


def test_the_peak_rises_and_a_reset_lowers_it():
    if not memory.STATUS.is_file() or "VmHWM" not in memory.STATUS.read_text():
        pytest.skip("no peak resident set in /proc/self/status")
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError as error:
        pytest.skip(f"the kernel does not let the peak be reset: {error}")
    memory.reset_peak(CPU)
    before = memory.peak_mb(CPU)
    block = allocate_200_mb()
    high = memory.peak_mb(CPU)
    assert 180 < high - before < 400
    del block
    assert memory.peak_mb(CPU) == pytest.approx(high, abs=20)  # a peak, not the present size
    memory.reset_peak(CPU)
    assert memory.peak_mb(CPU) < high - 150


def test_without_proc_the_operating_system_is_asked(monkeypatch, tmp_path):
    pytest.importorskip("resource")
    monkeypatch.setattr(memory, "STATUS", tmp_path / "absent")
    block = allocate_200_mb()
    assert memory.peak_mb(CPU) > 200
    del block


def test_a_status_file_without_the_peak(monkeypatch, tmp_path):
    pytest.importorskip("resource")
    path = tmp_path / "status"
    path.write_text("Name:\tpython\nVmRSS:\t12 kB\n")
    monkeypatch.setattr(memory, "STATUS", path)
    assert memory.peak_mb(CPU) > 1


def test_units(monkeypatch, tmp_path):
    path = tmp_path / "status"
    path.write_text("Name:\tpython\nVmHWM:\t    3072 kB\n")
    monkeypatch.setattr(memory, "STATUS", path)
    assert memory.peak_mb(CPU) == 3


def test_reset_survives_a_kernel_that_refuses(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(memory.Path, "write_text", refuse)
    memory.reset_peak(CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_allocators_peak_on_a_gpu():
    device = torch.device("cuda")
    memory.reset_peak(device)
    before = memory.peak_mb(device)
    block = torch.ones(200, 2**18, device=device)
    del block
    assert memory.peak_mb(device) == pytest.approx(before + 200, abs=5)
    memory.reset_peak(device)
    assert memory.peak_mb(device) == pytest.approx(before, abs=5)

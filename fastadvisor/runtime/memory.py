"""Peak memory of a run."""

import sys
from contextlib import suppress
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")


def reset_peak(device: torch.device) -> None:
    """Begin to measure: the allocator's peak on a GPU; on the CPU the peak resident set, where the kernel lets us."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float | None:
    """Return the peak in MiB since :func:`reset_peak`: memory torch allocated on the GPU, or the process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if STATUS.is_file():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:
        return None
    unit = 2**20 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

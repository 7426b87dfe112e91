"""The peak memory of a run, and the error message when memory runs out."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from fastadvisor.errors import OutOfMemoryError, UserError
from fastadvisor.runtime.allocator import release_freed_memory

STATUS = Path("/proc/self/status")
CPU_FULL = "DefaultCPUAllocator: can't allocate memory"


@contextmanager
def explain_out_of_memory(device: torch.device) -> Iterator[None]:
    """Turn running out of memory inside the block, here or in a worker process of a loader, into an OutOfMemoryError or another
    UserError.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's allocator on the CPU raises a plain RuntimeError
        if "DataLoader worker" in str(error):  # by a signal, so wherever the main process was
            raise UserError(
                "A worker of the data loader has ended, as happens when memory or /dev/shm runs out, or too many files are "
                "open: lower --workers or --batch-size."
            ) from None
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError) and CPU_FULL not in str(error):
            raise
        raise OutOfMemoryError(
            f"Out of memory ({device}): lower --batch-size, --eval-batch-size, --image-size or --advisor-width, "
            "add --lean, or choose a smaller --model."
        ) from None


def reset_peak(device: torch.device) -> None:
    """Reset the peak: that of the allocator on a GPU; on the CPU that of the resident set, where the kernel allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    gc.collect()
    release_freed_memory()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_mb(device: torch.device) -> float | None:
    """Return the peak in MiB since :func:`reset_peak`: of the memory that torch allocated on the GPU, or of the resident set of
    the process; None where the system does not tell.
    """
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

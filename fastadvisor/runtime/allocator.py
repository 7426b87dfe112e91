"""Settings of glibc's allocator: whether memory that a step frees stays in the process for the next step."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameter numbers of glibc's ``mallopt`` (malloc.h)."""

NEVER = 2**31 - 1
MMAP_MAX, TRIM_THRESHOLD = 65_536, 128 * 1024
"""glibc's defaults."""


def keep_freed_memory() -> bool:
    """Let glibc keep the memory that the process frees instead of returning it to the kernel; return whether that worked.

    By default a large tensor is mapped anew each time, and each of its pages faults on first touch; an exact meta step frees
    and allocates many. A ResNet-8 at batch 128 took 297 ms a step without this and 200 ms with it (docs/results/step.md). The
    resident set stays at its peak until the process ends.

    Process-wide and one-way. Does nothing, and returns False, without glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0)) and bool(libc.mallopt(M_TRIM_THRESHOLD, NEVER))


def return_freed_memory() -> None:
    """Undo :func:`keep_freed_memory`, for example in a child process that was forked after it."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, MMAP_MAX)
        libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)


def release_freed_memory() -> None:
    """Return memory that is free now to the kernel (glibc), so that the peak of one run does not count for the next."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)

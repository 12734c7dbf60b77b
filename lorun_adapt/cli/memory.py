"""Keep the memory that tensors free, so that a CPU runs large images faster."""

from __future__ import annotations

from ..util.memory import c_function

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h
LIMIT, OLD_LIMIT = 1 << 30, 1 << 25  # bytes; older versions accept no more for MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Make GNU's C library keep freed memory for the next tensor; does nothing with other C libraries.

    By default it returns the memory of large images to the system after each layer, and gets it back page by page for
    the next one, which takes nearly half of the time of a network's forward on a CPU. The setting is for the whole
    process, so only commands change it.
    """
    mallopt = c_function("mallopt")
    if mallopt is not None and (mallopt(MMAP_THRESHOLD, LIMIT) or mallopt(MMAP_THRESHOLD, OLD_LIMIT)):
        # By itself, this would be slower than the defaults.
        mallopt(TRIM_THRESHOLD, LIMIT)

"""How a process holds its memory."""

from __future__ import annotations

import contextlib
import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h
LIMIT, OLD_LIMIT = 1 << 30, 1 << 25  # bytes; older ones take no more for MMAP_THRESHOLD


def keep_freed_memory() -> None:
    """Have GNU's C library keep freed memory for the next tensor; elsewhere nothing happens.

    It gives what large images leave behind back to the system after each layer, and gets it anew, page by page, for the
    next: nearly half of the time of a network's forward on a CPU. It is the whole process's, so for commands only.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no mallopt, or Windows
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(MMAP_THRESHOLD, LIMIT) or mallopt(MMAP_THRESHOLD, OLD_LIMIT):  # without it, worse than before
            mallopt(TRIM_THRESHOLD, LIMIT)

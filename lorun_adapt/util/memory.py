"""The C library's memory: hand what was freed back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def release_freed_memory() -> None:
    """Let the C library give the pages of freed tensors back to the system, where it can.

    glibc keeps freed blocks of less than 32 MiB. PyTorch asks for aligned blocks, and before version 2.38 such a block
    often does not fit into the hole that one of the same size left
    (https://sourceware.org/bugzilla/show_bug.cgi?id=14581): a loop over large tensors would then take several times
    the memory that it needs. Does nothing with other C libraries.

    >>> release_freed_memory()
    """
    trim = c_function("malloc_trim")
    if trim is not None:
        trim(0)


@functools.cache
def c_function(name: str) -> Callable[..., int] | None:
    """Return a function of the C library that takes and returns numbers; None if it has none of this name.

    >>> c_function("abs")(-3), c_function("no_such_function")
    (3, None)
    """
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return None

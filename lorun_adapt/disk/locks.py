"""Locks on folders, between processes that save to the same place.

A process locks the folder that it fills; the system releases the lock when the process ends, however it ends. The
folder around is locked while entries in it change.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PATIENCE = 20.0  # seconds to wait for another process's save


def lock(folder: Path, seconds: float = 0.0) -> int | None:
    """Lock ``folder``, waiting for up to ``seconds``, and return a handle for :func:`unlock`.

    Return None where another process keeps it locked, or the system has no such locks.
    """
    if fcntl is None:
        return None
    handle, end = os.open(folder, os.O_RDONLY), time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES) or time.monotonic() > end:
                os.close(handle)
                return None
        time.sleep(0.005)


def unlock(handle: int | None) -> None:
    """Release the lock that :func:`lock` has returned; nothing to do for None."""
    if handle is not None:
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough where a forked process has the handle too
        os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Lock ``folder`` within the block; the value says whether that succeeded.

    Without the lock, two saves at the same moment could fail, but neither loses anything.
    """
    handle = lock(folder, PATIENCE)
    try:
        yield handle is not None
    finally:
        unlock(handle)

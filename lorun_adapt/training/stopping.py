"""Ctrl-C during training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that the current step can end; a second Ctrl-C interrupts at once."""
    event = threading.Event()
    ignored = signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None)  # as of a command with & in a script
    if ignored or threading.current_thread() is not threading.main_thread():
        yield event
        return

    def note(number: int, frame: object) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def stopped_by_interrupt(stop: threading.Event) -> Iterator[None]:
    """Within the block, Ctrl-C sets ``stop`` and ends the block, and so does an error that follows from it."""
    try:
        yield
    except KeyboardInterrupt:
        stop.set()
    except Exception:  # Ctrl-C also ends the workers of a loader, which then raises
        if not stop.is_set():
            raise

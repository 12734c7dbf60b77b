"""Progress bars for long work."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LOG_LINES = 20.0


def announce(text: str) -> None:
    """Write a line to standard error, above the bars that are open."""
    tqdm.write(text, file=sys.stderr)


def progress(items: Iterable[Any] | None, description: str, unit: str, **options: Any) -> tqdm:
    """Return a tqdm bar on standard error that moves on a terminal, and prints a line every 20 seconds in a log."""
    seconds = 0.5 if sys.stderr.isatty() else SECONDS_BETWEEN_LOG_LINES
    # Without miniters, tqdm would print each line of a log twice: once from its monitor, once at the next step.
    return tqdm(items, desc=description, unit=unit, mininterval=seconds, miniters=1, **options)

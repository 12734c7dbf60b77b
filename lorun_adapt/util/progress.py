"""Where long work is."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LOG_EVERY = 20.0  # seconds


def progress(items: Iterable[Any] | None, doing: str, unit: str, **options: Any) -> tqdm:
    """A bar on standard error: on a terminal one that moves, in a log a line now and then."""
    seconds = 0.5 if sys.stderr.isatty() else LOG_EVERY
    # Without miniters, tqdm would print each of a log's lines twice: its monitor, and the next step.
    return tqdm(items, desc=doing, unit=unit, mininterval=seconds, miniters=1, **options)

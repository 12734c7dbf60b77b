"""What trials and rounds share: short runs of recovery within a long one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from ..training.processes import num_processes, process_state
from ..util.progress import announce

ADVICE = ("recovery found nothing closer", ".*choose a higher rank", "the run in .* was over already")


@contextlib.contextmanager
def without_advice() -> Iterator[None]:
    """Within the block, no warning says that a run was short.

    >>> with without_advice():
    ...     warnings.warn("recovery found nothing closer to the original")
    """
    with warnings.catch_warnings():
        for message in ADVICE:
            warnings.filterwarnings("ignore", message)
        yield


def say(text: str) -> None:
    """Write a line to standard error, in the main process."""
    if num_processes() == 1 or process_state().is_main_process:
        announce(text)

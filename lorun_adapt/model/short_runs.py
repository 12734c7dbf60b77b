"""What trials and rounds share: short runs of recovery within a long one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

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


def state_files(path: Path | None, kind: str, count: int) -> list[Path | None]:
    """The state files of so many short runs, beside that of the long one; None for each if that has none.

    >>> [file.name for file in state_files(Path("run.state"), "trial", 2)]
    ['run.state.trial1', 'run.state.trial2']
    """
    return [None if path is None else path.with_name(f"{path.name}.{kind}{i + 1}") for i in range(count)]


def remove(files: Iterable[Path | None]) -> None:
    """Remove the state files that are there."""
    for file in files:
        if file is not None:
            file.unlink(missing_ok=True)


def say(text: str) -> None:
    """Write a line to standard error, in the main process."""
    if num_processes() == 1 or process_state().is_main_process:
        announce(text)

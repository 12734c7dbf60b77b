"""Times of functions that run in turns, so that what slows the machine for a while slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MIN_ROUNDS, MAX_ROUNDS = 3, 200


@dataclass(frozen=True)
class Times:
    """Seconds that one function took in each round.

    >>> times = Times((0.2, 0.1, 0.4))
    >>> times.median, round(times.spread, 3)
    (0.2, 0.375)
    """

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half of the range of the middle half of the times, as a fraction of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2 / self.median


def interleaved(
    functions: Mapping[str, Callable[[], object]], seconds: float, device: torch.device
) -> dict[str, Times]:
    """Run the functions in turns for about so many seconds, and at least ``MIN_ROUNDS`` times each.

    Args:
        functions: what to run, by name.
        seconds: for all of them together, after one round to warm up.
        device: where they run; a GPU is waited for.

    >>> found = interleaved({"sum": lambda: sum(range(100))}, 0.01, torch.device("cpu"))
    >>> len(found["sum"].seconds) >= MIN_ROUNDS
    True
    """
    found: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    start = time.perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - start > seconds:
            break
        for name, function in functions.items():
            wait_for(device)
            before = time.perf_counter()
            function()
            wait_for(device)
            found[name].append(time.perf_counter() - before)
    return {name: Times(tuple(times)) for name, times in found.items()}


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize() if hasattr(torch, "accelerator") else torch.cuda.synchronize(device)

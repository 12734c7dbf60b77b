"""How long to train, and how large the steps are on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import LoRunError

WARM_UP = 0.03  # of the duration


@dataclass(frozen=True)
class Duration:
    """Minutes on the clock or optimiser steps, one of the two.

    Raises:
        LoRunError: both or neither, or no number above 0.
    """

    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.minutes, self.steps) if value is not None]
        if len(given) != 1:
            raise LoRunError(
                f"expected minutes or steps to train for, found {'both' if given else 'neither'}: give one"
            )
        kinds = (int, float) if self.steps is None else int
        if not isinstance(given[0], kinds) or isinstance(given[0], bool) or not 0 < given[0] < 1e9:
            what = "minutes to be a number" if self.steps is None else "steps to be a whole number"
            raise LoRunError(f"expected {what} above 0, found {given[0]!r}: choose how long to train")

    def done(self, seconds: float, steps: int) -> float:
        """The part of it that is used up, in 0..1."""
        return min(1.0, seconds / (60 * self.minutes) if self.minutes else steps / (self.steps or 1))


def schedule(done: float) -> float:
    """The learning rate as a part of its peak when the part ``done`` (0..1) is used up: a warm-up, then a cosine."""
    if done < WARM_UP:
        return 0.1 + 0.9 * done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))

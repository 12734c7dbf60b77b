"""How long to train, and the learning rate on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import LoRunError
from ..util.numbers import is_number, is_whole_number

WARM_UP = 0.03  # fraction of the duration
LONGEST = 1e9  # minutes or steps
LEAST_MINUTES, LEAST_STEPS = 10, 1000  # of a run that begins with trials


@dataclass(frozen=True)
class Duration:
    """How long to train: minutes on the clock, or optimiser steps.

    >>> Duration(minutes=10).fraction_done(seconds=150, steps=7)
    0.25
    >>> Duration(steps=100).fraction_done(seconds=150, steps=7)
    0.07

    Args:
        minutes: a number above 0.
        steps: a whole number above 0; runs of so many steps repeat exactly, as runs of minutes can't.

    Raises:
        LoRunError: both or neither are given, or the one given is not such a number.
    """

    minutes: float | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        if self.minutes is None and self.steps is None:
            raise LoRunError("neither minutes nor steps is given: say how long to train with one of them")
        if self.minutes is not None and self.steps is not None:
            raise LoRunError("both minutes and steps are given: say how long to train with one of them")
        if self.minutes is not None and not (is_number(self.minutes) and 0 < self.minutes < LONGEST):
            raise LoRunError(
                f"expected minutes to be a number above 0, found {self.minutes!r}: choose how long to train"
            )
        if self.steps is not None and not (is_whole_number(self.steps) and 0 < self.steps < LONGEST):
            raise LoRunError(
                f"expected steps to be a whole number above 0, found {self.steps!r}: choose how long to train"
            )

    def after(self, seconds: float) -> Duration:
        """What is left of the duration, at least a second, after so many seconds of preparations.

        >>> Duration(minutes=10).after(seconds=150).minutes
        7.5
        """
        return Duration(max(1 / 60, self.minutes - seconds / 60)) if self.minutes else self

    def part(self, share: float) -> Duration:
        """A share, 0 to 1, of the duration; of steps, one at least.

        >>> Duration(steps=1000).part(0.1).steps
        100
        """
        if self.steps:
            return Duration(steps=max(1, round(share * self.steps)))
        return Duration(minutes=share * (self.minutes or 0))

    @property
    def total(self) -> int:
        """The duration in steps or, if it is in minutes, in seconds: the length of a progress bar."""
        return self.steps or round(60 * (self.minutes or 0))

    def position(self, seconds: float, steps: int) -> int:
        """How far a progress bar is after so many seconds and steps."""
        return steps if self.steps else round(seconds)

    def fraction_done(self, seconds: float, steps: int) -> float:
        """The fraction of the duration, 0 to 1, that is over after so many seconds and steps."""
        return min(1.0, seconds / (60 * self.minutes) if self.minutes else steps / (self.steps or 1))


def has_time_for_trials(duration: Duration) -> bool:
    """Whether a part of the duration is enough to see which conversion will be the better one.

    >>> has_time_for_trials(Duration(minutes=20)), has_time_for_trials(Duration(steps=300))
    (True, False)
    """
    return (duration.minutes or 0) >= LEAST_MINUTES or (duration.steps or 0) >= LEAST_STEPS


def learning_rate_schedule(done: float) -> float:
    """The learning rate as a fraction of its peak: a linear warm-up from 0.1, then a cosine down to 0.

    >>> [round(learning_rate_schedule(done), 2) for done in (0, 0.015, 0.03, 0.5, 1)]
    [0.1, 0.55, 1.0, 0.52, 0.0]

    Args:
        done: the fraction of the duration that is over, 0 to 1.
    """
    if done < WARM_UP:
        return 0.1 + 0.9 * done / WARM_UP
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))

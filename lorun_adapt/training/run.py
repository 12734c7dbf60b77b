"""The phases of a training run, and its progress."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .duration import Duration
from .stagewise import TeacherForcing

EARLIEST_END = 0.2  # the fraction of the duration before which a phase does not end for its number of steps
LEAST_PEAK = 0.25  # of the learning rate of a short phase


@dataclass(frozen=True)
class Phase:
    """A part of a run, with a learning rate that rises and falls within it.

    Attributes:
        label: text of the progress bar.
        until: the fraction of the duration at which it ends at the latest.
        enough_steps: after so many steps it ends earlier, but not before a fifth of the duration is over; 0 for never.
        patience: the number of checks in a row without a better result after which it ends early.
        forcing: what to minimise instead of the trainer's objective: the errors of single stages.
        full_rate_steps: if the phase has fewer steps than this, its highest learning rate is lower, by the square root
            of their ratio.
    """

    label: str
    until: float = 1.0
    patience: int | None = None
    forcing: TeacherForcing | None = None
    full_rate_steps: int = 0
    enough_steps: int = 0


@dataclass
class Run:
    """The progress of a run, as the state file keeps it."""

    step: int = 0
    seconds: float = 0.0
    phase: int = 0
    phase_step: int = 0  # steps in this phase
    began: float = 0.0  # the fraction of the duration at which the phase began
    phase_began: float = 0.0  # at this many seconds
    drawn: int = 0  # batches that were drawn before the phase began
    recent_loss: float | None = None  # the highest loss of the last steps
    rate_factor: float = 1.0  # of the learning rate: halved at each rollback
    spikes: int = 0  # steps in a row with a much larger loss than the ones before
    rollbacks: int = 0  # since the last good check
    skipped: int = 0  # batches with NaN or Inf, one after another
    first: float = math.inf  # loss on the held-out batches before training
    best: float = math.inf  # the lowest so far
    worse: int = 0  # checks since the best one
    bfloat16: bool = False


def end_of(phase: Phase, run: Run, duration: Duration) -> float:
    """The fraction of the duration at which a phase ends, as far as its steps so far let foresee."""
    if not phase.enough_steps or not duration.steps and run.phase_step < 2:
        return phase.until
    if duration.steps:
        needed = phase.enough_steps / duration.steps
    else:
        per_step = (run.seconds - run.phase_began) / run.phase_step
        needed = phase.enough_steps * per_step / (60 * (duration.minutes or 1))
    return min(phase.until, max(EARLIEST_END, run.began + needed))


def peak(phase: Phase, run: Run, duration: Duration) -> float:
    """The highest learning rate of a phase, relative to that of the tensors: lower where the phase is short."""
    if not phase.full_rate_steps:
        return 1.0
    if duration.steps:
        expected = (phase.until - run.began) * duration.steps
    elif run.phase_step < 2:  # the first step may take longer than others
        return LEAST_PEAK
    else:
        seconds = run.seconds - run.phase_began
        expected = (phase.until - run.began) * 60 * (duration.minutes or 0) * run.phase_step / seconds
    return min(1.0, max(LEAST_PEAK, math.sqrt(expected / phase.full_rate_steps)))

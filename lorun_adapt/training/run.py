"""The phases of a training run, and its progress."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from .duration import Duration
from .stagewise import TeacherForcing

EARLIEST_END = 0.2  # the fraction of the duration before which a phase does not end for its number of steps
LEAST_PEAK = 0.1  # of the learning rate of a short phase
UNTRAINED = 0.2  # of the steps for the full learning rate are enough where no phase before has trained the weights
GUIDED = 0.5  # the fraction of an end-to-end phase in which the errors of the stages count
EXACT = 1e-9  # a held-out loss below which there is nothing to recover


@dataclass(frozen=True)
class Phase:
    """A part of a run, with a learning rate that rises and falls within it.

    Attributes:
        label: text of the progress bar.
        until: the fraction of the duration at which it ends at the latest.
        until_if_slow: the same, where there is no time for many steps in the phases after it.
        enough_steps: after so many steps it ends earlier, but not before a fifth of the duration is over; 0 for never.
        patience: the number of checks in a row without a better result after which it ends early.
        until_psnr: it also ends, or is left out, when the network comes this close to the teacher, in dB.
        forcing: what to minimise instead of the trainer's objective: the errors of single stages.
        full_rate_steps: if the phase has fewer steps than this, its highest learning rate is lower, in proportion. Of
            the first phase that trains, a fifth is enough.
    """

    label: str
    until: float = 1.0
    until_if_slow: float | None = None
    patience: int | None = None
    until_psnr: float = math.inf
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
    phase_began: float = 0.0  # the seconds at which the phase began
    drawn: int = 0  # batches that were drawn before the phase began
    seen: int = 0  # and in all when the state was saved
    recent_loss: float | None = None  # the highest loss of the last steps
    rate_factor: float = 1.0  # of the learning rate: halved at each rollback
    spikes: int = 0  # steps in a row with a much larger loss than the ones before
    rollbacks: int = 0  # since the last good check
    skipped: int = 0  # batches with NaN or Inf, one after another
    first: float = math.inf  # loss on the held-out batches before training
    best: float = math.inf  # the lowest so far
    psnr: float = -math.inf  # of the output to the teacher's at the last check, in dB
    worse: int = 0  # checks since the best one
    bfloat16: bool = False
    judged: int | None = None  # how many of the held-out batches to judge on; None for all
    slow: bool = False  # there is no time for many steps
    left_out: list[int] = field(default_factory=list)  # batches of this phase whose loss was NaN or Inf

    def begin(self, phase: int, seconds: float) -> None:
        """Begin a phase, so many seconds after the start."""
        self.phase, self.phase_step, self.seconds, self.phase_began = phase, 0, seconds, seconds
        self.recent_loss, self.rate_factor, self.spikes, self.rollbacks, self.worse = None, 1.0, 0, 0, 0
        self.left_out = []

    def began(self, duration: Duration) -> float:
        """The fraction of the duration at which the phase began."""
        return duration.fraction_done(self.phase_began, self.step - self.phase_step)

    def steps_in(self, duration: Duration) -> float | None:
        """How many steps the duration has at the pace of this phase; None while that is not known."""
        if duration.steps:
            return duration.steps
        if self.phase_step < 2:  # the first step may take longer than others
            return None
        return 60 * (duration.minutes or 0) * self.phase_step / (self.seconds - self.phase_began)


def end_of(phase: Phase, run: Run, duration: Duration) -> float:
    """The fraction of the duration at which a phase ends, estimated from the pace of its steps so far."""
    steps = run.steps_in(duration)
    until = phase.until_if_slow if run.slow and phase.until_if_slow else phase.until
    if not phase.enough_steps or steps is None:
        return until
    return min(until, max(EARLIEST_END, run.began(duration) + phase.enough_steps / steps))


def peak(phase: Phase, run: Run, duration: Duration) -> float:
    """The highest learning rate of a phase, relative to that of the tensors: lower where the phase is short."""
    if not phase.full_rate_steps:
        return 1.0
    steps = run.steps_in(duration)
    if steps is None:
        return LEAST_PEAK
    expected = (phase.until - run.began(duration)) * steps
    enough = phase.full_rate_steps * (UNTRAINED if run.step == run.phase_step else 1.0)
    return min(1.0, max(LEAST_PEAK, expected / enough))


def guidance(done: float) -> float:
    """How much the errors of the stages count when this fraction of an end-to-end phase is over: less and less."""
    return max(0.0, 1 - done / GUIDED)


def is_above(value: float, other: float, factor: float) -> bool:
    """Return whether a loss, which may be negative, is more than so many times as large as another."""
    return value - other > (factor - 1) * max(abs(other), EXACT)

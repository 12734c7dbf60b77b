"""Factorise the original's tensors again in closed form, weighted by what they do, within a part of the budget."""

from __future__ import annotations

import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from ..factorise.refit import refit
from ..factorise.sensitivity import Sensitivity, sensitivities_of_stages
from ..factorise.weigh import sensitivity_on
from ..network.batches import Batch, while_there_is_time
from ..network.converted import Converted
from ..util.modules import tensors_in_state, write_back
from ..util.progress import progress
from .distill import Distillation, Example
from .duration import Duration
from .processes import broadcast
from .stagewise import TeacherForcing
from .stopping import stopped_by_interrupt

DAMPINGS = (0.1, 0.01, 1.0)  # small: many batches, small residuals; large: few batches, large residuals
MAX_PROBES = 40  # batches to measure sensitivities on
STEPS_PER_PROBE = 10  # one probe for every ten steps
FEW_STEPS = 30  # below so many steps, only the first damping is tried
MEASURING, FITTING = 0.05, 0.1  # the fractions of a budget in minutes at which measuring and fitting end,
FITTING_ONCE = 0.3  # and where fitting with the first damping ends at the latest

T = TypeVar("T")


def fit_in_closed_form(
    converted: Converted,
    teacher: nn.Module,
    objective: Distillation,
    forcing: TeacherForcing | None,
    examples: Sequence[Example],
    batches: Iterator[Batch],
    duration: Duration,
    seed: int,
    stop: threading.Event,
) -> None:
    """Set the weights to the best of the current ones and new factorisations of the teacher's tensors.

    The best are those with the least error of the stages on the teacher's inputs or, where stages cannot run alone,
    of the network.

    Args:
        converted: the network as data; its tensors are set in place.
        teacher: the original network.
        objective: knows the network that has these tensors.
        forcing: runs its stages alone; None if they can't.
        examples: held-out batches to choose on.
        batches: batches to measure sensitivities on, where stages cannot run alone.
        duration: of the whole run. Of minutes, this takes about a tenth. It takes longer, but less than a third, where
            one batch to measure on and one fit take longer.
        seed: seed of all random numbers.
        stop: ends the work early.
    """
    tensors = list(tensors_in_state(objective.student).values())  # they share memory with the network's tensors
    error = _error_of_stages(forcing, examples) if forcing else _error_of_network(objective, examples)
    time_left = _clock(duration, stop)
    best, least = [tensor.clone() for tensor in tensors], error()
    try:
        with stopped_by_interrupt(stop):
            known = _measure(converted, teacher, objective, forcing, batches, duration, seed, time_left)
            for damping in DAMPINGS if duration.steps is None or duration.steps >= FEW_STEPS else DAMPINGS[:1]:
                until = FITTING_ONCE if damping == DAMPINGS[0] else FITTING
                if not known or not time_left(until):
                    break
                complete = refit(converted, teacher, known, damping, functools.partial(time_left, until))
                if (found := broadcast(error())) < least:
                    best, least = [tensor.clone() for tensor in tensors], found
                if not complete:
                    break
    finally:
        write_back(tensors, best)


def _clock(duration: Duration, stop: threading.Event) -> Callable[[float], bool]:
    """A function that tells whether a fraction of the duration is still to come; the main process decides for all."""
    started = time.monotonic()

    def time_left(until: float) -> bool:
        over = duration.minutes is not None and time.monotonic() - started > until * 60 * duration.minutes
        return not broadcast(over or stop.is_set())

    return time_left


def _measure(
    converted: Converted,
    teacher: nn.Module,
    objective: Distillation,
    forcing: TeacherForcing | None,
    batches: Iterator[Batch],
    duration: Duration,
    seed: int,
    time_left: Callable[[float], bool],
) -> Mapping[tuple[str, str], Sensitivity]:
    count = MAX_PROBES if duration.steps is None else min(MAX_PROBES, max(2, duration.steps // STEPS_PER_PROBE))
    stage_map = converted.stage_map

    def probes(items: Iterator[T]) -> Iterator[T]:
        return itertools.islice(while_there_is_time(items, lambda: time_left(MEASURING)), count)

    if forcing is not None:
        recordings = probes(forcing.recordings.first())
        bar = progress(recordings, "weighing tensors, stage by stage", "batch", delay=2, leave=False)
        return sensitivities_of_stages(forcing.recorder, teacher, stage_map, bar, seed)
    return sensitivity_on(probes(batches), teacher, stage_map, objective.observer, seed)


def _error_of_stages(forcing: TeacherForcing, examples: Sequence[Example]) -> Callable[[], float]:
    recordings = [forcing.recorder.record(example.batch, example.seed) for example in examples]
    return lambda: _or_inf(forcing.error(recordings))


def _error_of_network(objective: Distillation, examples: Sequence[Example]) -> Callable[[], float]:
    def error() -> float:
        with torch.no_grad():
            return _or_inf(sum(float(objective(lambda example=example: example)[1]) for example in examples))

    return error


def _or_inf(value: float) -> float:
    return value if math.isfinite(value) else math.inf

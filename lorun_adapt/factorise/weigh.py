"""Measure on batches how sensitive a network's output is to its tensors."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable

from torch import nn

from ..network.batches import Batch, Batches, is_finite, while_there_is_time
from ..network.observe import Observer
from ..stages.stage_map import StageMap
from ..util.modules import evaluating
from ..util.progress import progress
from ..util.seeds import seeded
from .sensitivity import Sensitivity, sensitivities

PROBES = 20  # batches to measure on


def measure_sensitivity(
    teacher: nn.Module,
    stage_map: StageMap,
    calibration: Batches,
    seed: int,
    seconds: float = math.inf,
    probes: int = PROBES,
) -> dict[tuple[str, str], Sensitivity]:
    """Measure the sensitivity of a network's output to its tensors on the next batches of ``calibration``.

    Args:
        teacher: the network.
        stage_map: the positions of its stages.
        calibration: batches of arguments of the forward.
        seed: seed of the random numbers.
        seconds: how long this may take; one batch is always measured on.
        probes: the number of batches to draw at the most.

    Returns:
        The sensitivity by group and tensor.
    """
    with evaluating(teacher), seeded(seed):
        started = time.monotonic()
        observer = Observer(teacher, stage_map, calibration.first)
        batches = (batch for batch in itertools.islice(calibration, probes) if is_finite(batch))
        in_time = while_there_is_time(batches, lambda: time.monotonic() - started < seconds)
        return sensitivity_on(in_time, teacher, stage_map, observer, seed)


def sensitivity_on(
    batches: Iterable[Batch], teacher: nn.Module, stage_map: StageMap, observer: Observer, seed: int
) -> dict[tuple[str, str], Sensitivity]:
    """Measure the sensitivity on given batches, with a progress bar; see :func:`measure_sensitivity`."""
    bar = progress(batches, "weighing tensors", "batch", delay=2, leave=False)
    return sensitivities(teacher, stage_map, lambda *arguments: observer.run(*arguments).final, bar, seed)

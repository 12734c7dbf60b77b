"""Measure on batches what a network's output is sensitive to."""

from __future__ import annotations

import itertools

from torch import nn

from ..network.batches import Batch, Batches, is_finite
from ..network.observe import Observer
from ..stages.stage_map import StageMap
from ..util.modules import evaluating
from ..util.progress import progress
from ..util.seeds import seeded
from .sensitivity import Sensitivity, sensitivities

PROBES = 20  # batches on which it is measured


def measure_sensitivity(
    teacher: nn.Module, stage_map: StageMap, calibration: Batches, seed: int
) -> dict[tuple[str, str], Sensitivity]:
    """What the output of ``teacher`` is sensitive to, by group and tensor, on the next batches of ``calibration``."""
    with evaluating(teacher), seeded(seed):
        observer = Observer(teacher, stage_map, calibration.first)
        return sensitivity_on(probes(calibration), teacher, stage_map, observer, seed)


def sensitivity_on(
    batches: list[Batch], teacher: nn.Module, stage_map: StageMap, observer: Observer, seed: int
) -> dict[tuple[str, str], Sensitivity]:
    """The same on these batches; progress is shown."""
    bar = progress(batches, "weighing tensors", "batch", delay=2, leave=False)
    return sensitivities(teacher, stage_map, lambda *arguments: observer.run(*arguments).final, bar, seed)


def probes(calibration: Batches) -> list[Batch]:
    """The next batches of ``calibration`` to measure on, without those that hold NaN or Inf."""
    return [batch for batch in itertools.islice(calibration, PROBES) if is_finite(batch)]

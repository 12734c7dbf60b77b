"""."""

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

PROBES = 20  # batches on which it is measured what the output is sensitive to


def weigh(
    teacher: nn.Module, stage_map: StageMap, calibration: Batches, seed: int
) -> dict[tuple[str, str], Sensitivity]:
    """What the output of ``teacher`` is sensitive to, on the next batches of ``calibration``."""
    with evaluating(teacher), seeded(seed):
        return _weighed(teacher, stage_map, Observer(teacher, stage_map, calibration.first), _probes(calibration), seed)


def _weighed(
    teacher: nn.Module, stage_map: StageMap, observer: Observer, probes: list[Batch], seed: int
) -> dict[tuple[str, str], Sensitivity]:
    bar = progress(probes, "weighing tensors", "batch", delay=2, leave=False)
    return sensitivities(teacher, stage_map, lambda *arguments: observer.run(*arguments).final, bar, seed)


def _probes(calibration: Batches) -> list[Batch]:
    return [batch for batch in itertools.islice(calibration, PROBES) if is_finite(batch)]

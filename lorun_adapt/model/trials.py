"""Recover several conversions of one network for a short time, and the best of them for the rest."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..network.batches import Batch, Batches, is_finite
from ..network.observe import Observer
from ..training.distill import Distillation, Loss
from ..training.duration import Duration
from ..training.processes import broadcast, num_processes, process_state
from ..training.state_file import run_id_of
from ..training.trained import trainable_base
from ..util.modules import evaluating
from ..util.progress import announce
from ..util.seeds import seeded
from .lorun_model import LoRunModel

SHARE = 0.1  # of the duration, for each trial
BATCHES, JUDGED = 32, 4  # to try on, and of these, to compare on
MARGIN = 0.03  # of the error: by so much another one must be better than the first, which runs faster


def recover_best(
    candidates: Sequence[LoRunModel],
    dun: nn.Module,
    calibration: Iterable[Any],
    duration: Duration,
    *,
    loss: Loss | None = None,
    also: str | Sequence[str] = (),
    recompute: bool = False,
    resume_from: Path | None = None,
    seed: int = 0,
) -> tuple[LoRunModel, bool]:
    """Recover one of several conversions of ``dun``: the one that is the closest to it after a tenth of the duration.

    What a conversion keeps of the weights says little about how good it becomes; the first steps say more. Of two that
    are about as close, it is the first one. A run of steps takes so many for the one that is chosen. With a state file,
    the choice is the one that was made before.

    Args:
        candidates: the conversions, those that run faster first. They are changed in place; a single one is recovered
            at once.
        dun: the original network.
        calibration, loss, also, recompute, resume_from, seed: as in :meth:`LoRunModel.recover`.
        duration: of everything together.

    Returns:
        The conversion that was chosen, and False if Ctrl-C stopped its training.
    """
    started, stream = time.monotonic(), calibration
    settings: dict[str, Any] = {"loss": loss, "also": also, "recompute": recompute, "seed": seed}
    chosen, finished = candidates[0], True
    if len(candidates) > 1:
        with seeded(seed):
            stream = Batches(calibration)
            batches = list(itertools.islice(stream, BATCHES))  # as many if the trials are over already
        if resume_from is not None and resume_from.exists():
            chosen = _tried_before(candidates, also, resume_from)
        else:
            chosen, finished = _best(candidates, dun, batches, duration.part(SHARE), settings)
        duration = _rest(duration, time.monotonic() - started, len(candidates))
    if finished:
        finished = chosen.recover(
            dun, stream, minutes=duration.minutes, steps=duration.steps, resume_from=resume_from, **settings
        )
    return chosen, finished


def _best(
    candidates: Sequence[LoRunModel], dun: nn.Module, batches: list[Batch], trial: Duration, settings: dict[str, Any]
) -> tuple[LoRunModel, bool]:
    """The best one after a trial of each, and False if Ctrl-C stopped a trial."""
    judged = [batch for batch in batches if is_finite(batch)][:JUDGED]
    training = batches[JUDGED:] or batches
    found: list[tuple[float, LoRunModel]] = []
    for number, lorun in enumerate(candidates, 1):
        _say(f"trial {number} of {len(candidates)}: {_bases(lorun)}")
        finished = lorun.recover(dun, training, minutes=trial.minutes, steps=trial.steps, **settings)
        if not finished:
            return (found[0][1] if found else lorun), False
        error = _error(lorun, dun, judged, settings["loss"], settings["seed"])
        found.append((broadcast(error), lorun))
    (least, chosen), *rest = found
    for error, lorun in rest:
        if least - error > MARGIN * abs(least):
            least, chosen = error, lorun
    others = " and ".join(f"{error:.4g}" for error, lorun in found if lorun is not chosen)
    _say(f"going on {_bases(chosen)}: its error is {least:.4g}, against {others}")
    return chosen, True


def _rest(duration: Duration, seconds: float, trials: int) -> Duration:
    """What is left after the trials, or was left when they were made."""
    if duration.steps:
        return Duration(steps=max(1, duration.steps - (duration.part(SHARE).steps or 0)))
    return duration.after(max(seconds, 60 * (duration.minutes or 0) * SHARE * trials))


@torch.no_grad()
def _error(lorun: LoRunModel, dun: nn.Module, batches: Sequence[Batch], loss: Loss | None, seed: int) -> float:
    """The mean of what recovery minimises, on batches that it did not train on."""
    with evaluating(lorun), evaluating(dun):
        objective = Distillation(lorun.network, dun, Observer(dun, lorun.stage_map, batches[0]), loss)
        examples = [objective.example(batch, seed) for batch in batches]
        return sum(float(objective(lambda example=example: example)[1]) for example in examples) / len(examples)


def _tried_before(candidates: Sequence[LoRunModel], also: str | Sequence[str], path: Path) -> LoRunModel:
    """The candidate that trained in the run of a state file; the first one if it belongs to another run."""
    known = run_id_of(path)
    for lorun in candidates:
        with trainable_base(lorun.converted(), lorun.network, also) as trained:
            if known.endswith(str([tuple(item.parameter.shape) for item in trained])):
                return lorun
    return candidates[0]


def _bases(lorun: LoRunModel) -> str:
    """How many tensors have a base, as the end of a sentence."""
    report = lorun.report()
    if not report.num_without_base:
        return "with a base for every tensor"
    return f"without a base for {report.num_without_base} of {report.num_adapted} tensors"


def _say(text: str) -> None:
    if num_processes() == 1 or process_state().is_main_process:
        announce(text)

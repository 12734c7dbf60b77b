"""Recover several conversions of one network for a short time, and the best of them for the rest."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import LoRunError
from ..network.batches import Batch, Batches, is_finite
from ..network.observe import Observer, forward_arguments
from ..training.distill import Distillation, Loss
from ..training.duration import Duration
from ..training.fit import is_later
from ..training.processes import broadcast, num_processes
from ..training.recovery import FORWARDS_PER_STEP
from ..training.replay import owned
from ..training.state_file import run_id_of
from ..training.trained import trainable_base
from ..util.modules import evaluating, unchanged
from ..util.nested import device_of, num_bytes, to_device
from ..util.seeds import seeded
from .lorun_model import LoRunModel
from .short_runs import remove, say, state_files, without_advice

SHARE = 0.1  # of the duration, for each trial
BATCHES, JUDGED = 32, 4  # to try on, and of these, to compare on
MAX_BYTES = 1 << 30  # of these batches
DRAWING = 0.02  # the fraction of the minutes in which they are drawn
LEAST_STEPS = 40  # of a trial that is to tell anything
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
    """Recover the best of several conversions of ``dun``: try each for a tenth of the duration, then go on with one.

    The energy that a conversion keeps says little about the quality that it will reach; the first steps say more. The
    one closest to ``dun`` after its trial is chosen, or the first one if no other is clearly closer. If a tenth of the
    minutes is too short for 40 steps, there are no trials, and the first one is chosen. If the duration is in steps,
    the chosen conversion trains for that many in all, its trial included. With a state file, each trial has its own
    file beside it until the run ends, and a run that resumes keeps the earlier choice.

    Args:
        candidates: the conversions, those that run faster first. They are changed in place; a single one is recovered
            at once.
        dun: the original network.
        calibration, loss, also, recompute, resume_from, seed: as in :meth:`LoRunModel.recover`.
        duration: of everything together.

    Returns:
        The conversion that was chosen, and False if Ctrl-C stopped its training.

    Raises:
        LoRunError: as :meth:`LoRunModel.recover`; of trials, only if each of them failed.
    """
    started, stream = time.monotonic(), calibration
    settings: dict[str, Any] = {"loss": loss, "also": also, "recompute": recompute, "seed": seed}
    chosen, finished, trials = candidates[0], True, 0
    files = state_files(resume_from, "trial", len(candidates))
    if len(candidates) > 1:
        with seeded(seed):
            stream = Batches(calibration)
            # Drawn on resume too: so the stream goes on from the same batch.
            batches = _first_batches(stream, duration, started)
        if resume_from is not None and resume_from.exists():
            chosen = _tried_before(candidates, also, resume_from)
            trials = len(candidates)
        elif _tells_something(duration.part(SHARE), dun, batches[0], seed):
            chosen, finished = _best(candidates, dun, batches, duration.part(SHARE), files, settings)
            trials = len(candidates)
        del batches
        duration = _rest(duration, time.monotonic() - started, trials)
    if finished:
        finished = chosen.recover(
            dun, stream, minutes=duration.minutes, steps=duration.steps, resume_from=resume_from, **settings
        )
        if finished:
            remove(files)
    return chosen, finished


def _first_batches(stream: Batches, duration: Duration, started: float) -> list[Batch]:
    """The batches for the trials: fewer if they are large, or take long to make."""
    batches: list[Batch] = []
    size = 0
    for batch in itertools.islice(stream, BATCHES):
        batches.append(owned(batch))
        size += num_bytes(batch)
        if broadcast(size >= MAX_BYTES) or is_later(duration, started, DRAWING):
            break
    return batches


@torch.no_grad()
def _tells_something(trial: Duration, dun: nn.Module, batch: Batch, seed: int) -> bool:
    """Whether a trial has time for enough steps."""
    if trial.minutes is None:
        return True
    device = device_of(dun)
    with evaluating(dun), unchanged((dun,)), seeded(seed):
        inputs = to_device(forward_arguments(dun, batch), device)
        if device.type == "cuda":
            dun(*inputs)  # the first forward also loads kernels
            torch.cuda.synchronize(device)
        started = time.monotonic()
        dun(*inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return broadcast(60 * trial.minutes > LEAST_STEPS * FORWARDS_PER_STEP * (time.monotonic() - started))


def _best(
    candidates: Sequence[LoRunModel],
    dun: nn.Module,
    batches: Sequence[Batch],
    trial: Duration,
    files: Sequence[Path | None],
    settings: dict[str, Any],
) -> tuple[LoRunModel, bool]:
    """The best one after a trial of each, and False if Ctrl-C stopped a trial."""
    judged = [batch for batch in batches if is_finite(batch)][:JUDGED]
    training = batches[JUDGED:] or batches
    found: list[tuple[float, LoRunModel]] = []
    failures: list[LoRunError] = []
    for number, (lorun, file) in enumerate(zip(candidates, files), 1):
        say(f"trial {number} of {len(candidates)}: {_bases(lorun)}")
        try:
            with without_advice():
                finished = lorun.recover(
                    dun, training, minutes=trial.minutes, steps=trial.steps, resume_from=file, **settings
                )
            error = _error(lorun, dun, judged, settings["loss"], settings["seed"]) if finished else math.inf
        except KeyboardInterrupt:  # outside of training
            finished = False
        except LoRunError as failure:
            if num_processes() > 1:  # others may not have failed, and would wait for this one
                raise
            failures.append(failure)
            say(f"trial {number} failed: {failure}")
            continue
        if not finished:
            return (_closest(found)[1] if found else lorun), False
        found.append((broadcast(error), lorun))
    if not found:
        raise failures[0]
    least, chosen = _closest(found)
    others = " and ".join(f"{error:.4g}" for error, lorun in found if lorun is not chosen)
    say(f"going on {_bases(chosen)}" + (f": its error is {least:.4g}, against {others}" if others else ""))
    return chosen, True


def _closest(found: Sequence[tuple[float, LoRunModel]]) -> tuple[float, LoRunModel]:
    """The first one, unless another has a clearly smaller error."""
    (least, chosen), *rest = found
    for error, lorun in rest:
        if math.isfinite(error) and (not math.isfinite(least) or least - error > MARGIN * abs(least)):
            least, chosen = error, lorun
    return least, chosen


def _rest(duration: Duration, seconds: float, trials: int) -> Duration:
    """What is left after the trials, or was left when they were made."""
    if not trials:
        return duration.after(seconds)
    if duration.steps:
        return Duration(steps=max(1, duration.steps - (duration.part(SHARE).steps or 0)))
    return duration.after(max(seconds, 60 * (duration.minutes or 0) * SHARE * trials))


@torch.no_grad()
def _error(lorun: LoRunModel, dun: nn.Module, batches: Sequence[Batch], loss: Loss | None, seed: int) -> float:
    """The mean of what recovery minimises, on the same batches for each conversion."""
    with evaluating(lorun), evaluating(dun), unchanged((lorun.network, dun)), seeded(seed):
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

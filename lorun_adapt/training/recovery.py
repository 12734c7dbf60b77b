"""Give a converted network the quality of its original back: distil that into it, from measurements alone."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import LoRunError
from ..factorise.refit import refit
from ..factorise.weigh import _probes, _weighed
from ..network.batches import Batches
from ..network.observe import Observer
from ..util.fingerprint import fingerprint_of
from ..util.modules import distinct_tensors, evaluating
from ..util.seeds import seeded
from .distill import Distillation, Loss, check_teacher
from .duration import Duration
from .speed import channels_last
from .trained import trainable
from .trainer import Trainer, interruptible

if TYPE_CHECKING:
    from ..model.lorun_model import LoRunModel

DAMPINGS = (0.01, 0.1, 1.0)  # tried for the factorisation: small ones hold where little is lost, large ones elsewhere


def recover(
    lorun: LoRunModel,
    teacher: nn.Module,
    calibration: Batches,
    duration: Duration,
    *,
    loss: Loss | None = None,
    resume_from: Path | None = None,
    seed: int = 0,
) -> bool:
    """Train base and adapters of ``lorun``; see :meth:`LoRunModel.recover`.

    It starts from what is there, or from the teacher's weights factorised by what the measurements
    show the output to be sensitive to, whichever is nearer to the teacher.
    """
    if len(lorun.adapter_names) > 1:
        raise LoRunError(
            f"expected one adapter set, found {lorun.adapter_names}: recovery changes the base, which is that of them "
            "all, so recover first and load the others afterwards"
        )
    started = time.monotonic()
    check_teacher(teacher, lorun)
    before = _fingerprints(lorun)
    try:
        with evaluating(teacher), evaluating(lorun), trainable(lorun) as trained:
            observer = Observer(teacher, lorun.stage_map, calibration.first)
            distillation = Distillation(lorun, teacher, observer, loss)
            with interruptible() as stop, channels_last(distillation, calibration.first, seed), seeded(seed):
                if resume_from is None or not resume_from.exists():
                    choose_start(distillation, lorun, teacher, calibration, seed, stop)
                else:
                    _probes(calibration)  # drawn then too
                trainer = Trainer(
                    distillation,
                    trained,
                    calibration,
                    duration,
                    seed=seed,
                    resume_from=resume_from,
                    run_id=f"{lorun.stage_map.network} {fingerprint_of(distinct_tensors(teacher))}",
                    spent=time.monotonic() - started,
                )
                finished = trainer.train(stop)
    finally:
        now = _fingerprints(lorun)
        if now[0] != before[0]:
            lorun._fingerprint = None
        if now != before:  # what was measured was so of other weights
            lorun.adapter_info = {n: dataclasses.replace(about, measured=()) for n, about in lorun.adapter_info.items()}
    if not finished:
        warnings.warn("recovery was stopped: the network has the best weights so far", stacklevel=3)
    return finished


def _fingerprints(lorun: LoRunModel) -> tuple[str, str]:
    """Of the base as it is in memory, and of all of it: with the adapters, and what sets have outside the stages."""
    return fingerprint_of(distinct_tensors(lorun.base)), fingerprint_of(lorun.state_dict())


def choose_start(
    distillation: Distillation,
    lorun: LoRunModel,
    teacher: nn.Module,
    calibration: Batches,
    seed: int,
    stop: threading.Event,
) -> None:
    """Of the weights that ``lorun`` has and those that :func:`refit` finds, leave the ones nearest to the teacher."""
    tensors = list(lorun.state_dict().values())  # they share memory with the network's
    best, nearest = [tensor.clone() for tensor in tensors], math.inf
    try:
        probes = _probes(calibration)
        known = _weighed(teacher, lorun.stage_map, distillation.observer, probes, seed)
        for damping in (None, *DAMPINGS) if known else ():
            if stop.is_set():
                break
            if damping is not None:
                refit(lorun, teacher, known, damping)
            with torch.no_grad():
                found = sum(float(distillation(lambda b=batch: b, seed)[1]) for batch in probes[:2])
            if found < nearest:
                best, nearest = [tensor.clone() for tensor in tensors], found
    except KeyboardInterrupt:
        stop.set()
    finally:
        for tensor, value in zip(tensors, best):
            tensor.copy_(value)

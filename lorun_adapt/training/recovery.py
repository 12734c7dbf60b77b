"""Recover the quality of a converted network by distillation from the original, without ground truth."""

from __future__ import annotations

import math
import threading
import time
import warnings
from pathlib import Path

import torch
from torch import nn

from ..errors import LoRunError
from ..factorise.refit import refit
from ..factorise.weigh import probes, sensitivity_on
from ..network.batches import Batches
from ..network.converted import Converted
from ..util.fingerprint import fingerprint_of
from ..util.modules import distinct_tensors
from .distill import Distillation, Loss, check_teacher
from .duration import Duration
from .fit import ready_to_train
from .supervised import Supervised
from .trained import trainable_base
from .trainer import Trainer

DAMPINGS = (0.01, 0.1, 1.0)  # all are tried: small values suit small residuals, large values large residuals


def recover(
    converted: Converted,
    network: nn.Module,
    teacher: nn.Module,
    calibration: Batches,
    duration: Duration,
    loss: Loss | None = None,
    resume_from: Path | None = None,
    seed: int = 0,
) -> bool:
    """Train the base and the adapters in place; see :meth:`LoRunModel.recover`.

    Training starts from the current weights, or from a new factorisation of the teacher's weights that is weighted by
    the sensitivity of the output, whichever is nearer to the teacher.

    Args:
        converted: the network as data.
        network: the same network assembled, with the same tensors.
        teacher: the original network.
        calibration: batches of arguments of the forward.
        duration: how long to train.
        loss: replaces the distance to the teacher's output.
        resume_from: the state file.
        seed: seed of all random numbers.

    Returns:
        True if training finished, False if Ctrl-C stopped it.
    """
    if len(converted.sets) > 1:
        raise LoRunError(
            f"recovery changes the base, which the sets {list(converted.sets)} share: recover with only one set, "
            "before you add others"
        )
    started = time.monotonic()
    check_teacher(teacher, converted.base)
    first = calibration.first
    with (
        trainable_base(converted, network) as trained,
        ready_to_train(network, converted.stage_map, first, loss, teacher, seed) as (distillation, stop),
    ):
        if resume_from is None or not resume_from.exists():
            choose_initial_weights(distillation, converted, teacher, calibration, seed, stop)
        else:
            probes(calibration)  # drawn to keep the order of batches as in the run that is resumed
        trainer = Trainer(
            distillation,
            trained,
            calibration,
            duration,
            seed=seed,
            resume_from=resume_from,
            run_id=f"{converted.stage_map.network} {fingerprint_of(distinct_tensors(teacher))}",
            spent=time.monotonic() - started,
        )
        finished = trainer.train(stop)
    if not finished:
        warnings.warn("recovery was stopped: the best weights so far are kept", stacklevel=3)
    return finished


def choose_initial_weights(
    distillation: Distillation | Supervised,
    converted: Converted,
    teacher: nn.Module,
    calibration: Batches,
    seed: int,
    stop: threading.Event,
) -> None:
    """Set the weights nearest to the teacher: the current ones, or those from :func:`refit`."""
    tensors = list(distillation.student.state_dict().values())  # they share memory with the network's tensors
    best, nearest = [tensor.clone() for tensor in tensors], math.inf
    try:
        batches = probes(calibration)
        known = sensitivity_on(batches, teacher, converted.stage_map, distillation.observer, seed)
        for damping in (None, *DAMPINGS) if known else ():
            if stop.is_set():
                break
            if damping is not None:
                refit(converted, teacher, known, damping)
            with torch.no_grad():
                distance = sum(float(distillation(lambda b=batch: b, seed)[1]) for batch in batches[:2])
            if distance < nearest:
                best, nearest = [tensor.clone() for tensor in tensors], distance
    except KeyboardInterrupt:
        stop.set()
    finally:
        for tensor, value in zip(tensors, best):
            tensor.copy_(value)

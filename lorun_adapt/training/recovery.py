"""Recover the quality of a converted network by distillation from the original, without ground truth.

Three phases share one budget. First the original's tensors are factorised again in closed form, weighted by their
effect on the output of their stage. Then each stage trains by itself on the inputs that the original gives to its own
stage (teacher forcing). Then the network trains end to end. If no stage can run alone, tensors are weighted by their
effect on the network's output, and teacher forcing is skipped.
"""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import nn

from ..errors import LoRunError
from ..network.adapter import terms_of
from ..network.batches import Batches, finite_batches_of, next_finite
from ..network.converted import Converted
from ..network.divergence import factor_between, warn_if_far
from ..network.eight_bits import check_floats
from ..network.recording import Recorder
from ..util.fingerprint import fingerprint_of
from ..util.modules import distinct_tensors, unchanged
from .closed_form import fit_in_closed_form
from .distill import Distillation, Example, Loss, check_teacher
from .duration import Duration
from .fit import SLOW_START, is_later, ready_to_train
from .processes import broadcast, broadcast_tensors, num_processes
from .replay import STEPS_PER_BATCH, Replay
from .run import Phase
from .stagewise import TeacherForcing
from .trained import TrainedTensor, trainable_base
from .trainer import Trainer

ENOUGH_STEPS = 500  # of teacher forcing
TOO_LATE = 0.5  # the fraction of the minutes after which there is no time for the closed form
FORCING_UNTIL = 0.6  # the fraction of the budget at which it ends at the latest,
FORCING_UNTIL_IF_SLOW = 0.85  # where it ends if there is no time for many end-to-end steps,
FORCING_UNTIL_WITH_LOSS = 0.3  # and where it ends if there is a loss other than the distance to the teacher
MANY_STEPS = 80  # end to end,
FORWARDS_PER_STEP = 3.5  # each of which takes so many forwards of one network
FULL_RATE_STEPS = 1500  # with fewer end-to-end steps, the learning rate is lower, as the weights are good already
FULL_RATE_STEPS_WITH_LOSS = 300  # the same with a loss other than the distance to the teacher: it may lie far off
PATIENCE = 4  # teacher forcing ends after so many checks without a better result,
CLOSE = 20.0  # or, if stages take turns, where the network is this close to the teacher, in dB


def recover(
    converted: Converted,
    network: nn.Module,
    teacher: nn.Module,
    calibration: Batches,
    duration: Duration,
    loss: Loss | None = None,
    also: str | Collection[str] = (),
    recompute: bool = False,
    resume_from: Path | None = None,
    seed: int = 0,
    closed_form: bool = True,
) -> bool:
    """Train the base and the adapters in place; see :meth:`LoRunModel.recover`.

    Args:
        converted: the network as data.
        network: the same network assembled, with the same tensors.
        teacher: the original network.
        calibration: batches of arguments of the forward.
        duration: how long to train.
        loss: replaces the distance to the teacher's output.
        also: glob patterns of parameters outside the stages to train as well.
        recompute: run the stages again in the backward pass, to save memory.
        resume_from: the state file.
        seed: seed of all random numbers.
        closed_form: begin with the factorisation in closed form, and not with the weights as they are.

    Returns:
        True if training finished, False if Ctrl-C stopped it.
    """
    if len(converted.sets) > 1:
        raise LoRunError(
            f"recovery changes the base, which the sets {list(converted.sets)} share: recover with only one set, "
            "before you add others"
        )
    started = time.monotonic()
    duration = broadcast(duration)  # what is left of some minutes is not the same in each process
    check_teacher(teacher, converted.base)
    check_floats(network, "trained")
    first = calibration.first
    with (
        trainable_base(converted, network, also) as trained,
        unchanged((network, teacher), [tensor for item in trained for tensor in (item.parameter, *item.beside)]),
        ready_to_train(network, converted.stage_map, first, loss, teacher, seed, duration, started, recompute) as (
            objective,
            stop,
        ),
    ):
        assert isinstance(objective, Distillation)  # there is a teacher
        held_out = finite_batches_of(calibration)
        recorder = Recorder(teacher, converted.stage_map, objective.observer, held_out[0])
        recorder.sites, recorder.numel = broadcast((recorder.sites, recorder.numel))
        batches = (next_finite(calibration) for _ in itertools.count())
        # Each process records the teacher for the steps of all.
        recordings = Replay(batches, recorder.record, seed, steps_per_batch=STEPS_PER_BATCH * num_processes())
        forcing = TeacherForcing(network, recorder, recordings) if recorder.sites else None
        trainer = Trainer(
            objective,
            trained,
            calibration,
            duration,
            seed=seed,
            resume_from=resume_from,
            run_id=f"{converted.stage_map.network} {fingerprint_of(distinct_tensors(teacher))}",
            phases=_phases(forcing, loss),
            started=started,
            held_out=held_out,
        )
        resumes = resume_from is not None and resume_from.exists()
        if not resumes and not is_later(duration, started, 1.0):
            if is_later(duration, started, SLOW_START):
                trainer.run.judged = 1
            trainer.judge()
            examples = trainer.examples
            seconds = broadcast(trainer.seconds_per_check) / math.ceil(len(examples) / num_processes())
            trainer.run.slow = _is_slow(duration, seconds)
            if closed_form and _terms_train(converted, trained) and not is_later(duration, started, TOO_LATE):
                fit_in_closed_form(converted, teacher, objective, forcing, examples, batches, duration, seed, stop)
                broadcast_tensors(trainer.optimised.changing)
                trainer.judge()
        finished = trainer.train(stop)
        for example in trainer.examples[:1]:  # there is none if there was no time
            _warn_if_it_diverges(objective, example, teacher)
    if not finished:
        warnings.warn("recovery was stopped: the best weights so far are kept", stacklevel=4)
    elif not trainer.improved:
        warnings.warn(
            "recovery found nothing closer to the original than the weights it began with, and kept these: train for "
            "longer, or on more images",
            stacklevel=4,
        )
    return finished


def _phases(forcing: TeacherForcing | None, loss: Loss | None) -> list[Phase]:
    full_rate = FULL_RATE_STEPS if loss is None else FULL_RATE_STEPS_WITH_LOSS
    end_to_end = Phase("recovering, end to end", full_rate_steps=full_rate)
    if forcing is None:
        return [end_to_end]
    stage_by_stage = Phase(
        "recovering, stage by stage",
        FORCING_UNTIL if loss is None else FORCING_UNTIL_WITH_LOSS,
        FORCING_UNTIL_IF_SLOW if loss is None else None,
        PATIENCE,
        CLOSE if forcing.takes_turns else math.inf,
        forcing,
        enough_steps=ENOUGH_STEPS,
    )
    return [stage_by_stage, end_to_end]


@torch.no_grad()
def _warn_if_it_diverges(objective: Distillation, example: Example, teacher: nn.Module) -> None:
    assert example.target is not None
    outputs = objective.observer.run(objective.student, example.batch, example.seed).final
    advice = "train for longer, or choose a higher rank"
    warn_if_far(factor_between(outputs, example.target.final), teacher, advice)


def _is_slow(duration: Duration, seconds: float) -> bool:
    """Whether the usual part of the duration has no time for many end-to-end steps.

    Args:
        duration: of the whole run.
        seconds: what one forward takes.
    """
    return (
        duration.minutes is not None
        and (1 - FORCING_UNTIL) * 60 * duration.minutes < MANY_STEPS * FORWARDS_PER_STEP * seconds
    )


def _terms_train(converted: Converted, trained: Sequence[TrainedTensor]) -> bool:
    """Whether all terms train: only then may they be fitted anew together with the base."""
    ids = {id(item.parameter) for item in trained}
    adapters = [adapter for stage in converted.choice.values() for adapter in stage.values()]
    terms = [term for adapter in adapters for term in terms_of(adapter).values()]
    return all(id(parameter) in ids for term in terms for parameter in term.parameters())

"""Train tensors of any network on a loss, against a teacher, or on both: what recovery and fine-tuning share."""

from __future__ import annotations

import itertools
import operator
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..errors import LoRunError
from ..network.batches import HELD_OUT, Batch, Batches, is_finite
from ..network.observe import Observer
from ..network.recording import denoiser_at
from ..stages.stage_map import StageMap
from ..util.modules import evaluating
from ..util.numbers import is_number, is_whole_number
from ..util.seeds import seeded
from ..util.threads import helpful_threads
from ..util.torch_modes import in_own_modes
from .distill import Distillation, Loss
from .duration import Duration
from .processes import broadcast
from .run import Phase
from .speed import channels_last
from .stopping import interruptible
from .supervised import Supervised
from .trained import TrainedTensor, sizes_of_zeros
from .trainer import Trainer

RATE = 0.02  # learning rate relative to the size of a tensor's values, unless the caller gives others
SLOW_START = 0.1  # if the start has taken this fraction of the minutes, the rest of it leaves out what it can


@in_own_modes
def fit(
    network: nn.Module,
    batches: Iterable[Any],
    trained: Iterable[tuple[nn.Parameter, float]] | None = None,
    *,
    loss: Loss | None = None,
    teacher: nn.Module | None = None,
    stage_map: StageMap | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    held_out: Iterable[Any] | None = None,
    patience: int | None = None,
    seed: int = 0,
) -> bool:
    """Train any network in place, with the optimiser and the losses of recovery and fine-tuning.

    Use it to train the networks that you compare a conversion with, such as a smaller network or other adapters. The
    network runs in ``eval()`` mode. The weights that do best on the held-out batches are kept, also after Ctrl-C.
    Parameters that are not trained are frozen meanwhile.

    Args:
        network: the network to train.
        batches: argument tuples of the forward (or tensors, if it takes one), repeated when they end. Items beyond the
            positional arguments of the forward are for ``loss``.
        trained: the parameters to train, each with its peak learning rate relative to the root mean square of its
            values, above 0. By default all that have ``requires_grad``, at 0.02. For factors of an adapter that are
            all zero, it is relative to the size that they would have in a trained adapter.
        loss: a callable ``loss(output, batch)`` to minimise, which returns a scalar tensor.
        teacher: a network to distil from, instead of or in addition to ``loss``: its output for a batch is the target.
        stage_map: the stages of the teacher, as :func:`find_stages` returns them. What they return is a target too, so
            the network needs modules of the same names. By default only the output counts.
        minutes, steps: how long to train; give exactly one.
        held_out: the batches to judge by; by default the first two of ``batches``.
        patience: training ends early after this many checks in a row without an improvement; a run has 25 checks on
            the held-out batches. After three, six and nine such checks, training goes on from the best weights with
            half the learning rate. By default it does neither.
        seed: seed of all random numbers. The same seed and ``steps`` give the same weights on a CPU.

    Returns:
        True if training finished, False if Ctrl-C stopped it.

    Raises:
        LoRunError: neither loss nor teacher; nothing to train, a frozen or 16-bit parameter, one that is listed twice,
            or a rate that is not above 0; patience below 1; a network without the teacher's stages; batches that do not
            fit the network, or have only NaN or Inf; both or neither of minutes and steps.

    >>> import lorun_adapt, torch
    >>> from lorun_adapt.util.toy import ToyUnfoldingNet
    >>> teacher, student = ToyUnfoldingNet(stages=3), ToyUnfoldingNet(stages=2)
    >>> lorun_adapt.fit(student, [torch.rand(2, 1, 8, 8)], teacher=teacher, steps=2)
    True
    """
    started = time.monotonic()
    duration = Duration(minutes, steps)
    if patience is not None and not is_whole_number(patience, least=1):
        raise LoRunError(f"expected patience of 1 or more checks, found {patience!r}: leave it out to train to the end")
    check_target(loss, teacher)
    tensors = _trained(network, trained)
    _check_stages(network, stage_map)
    with seeded(seed):
        stream = Batches(batches)
        judged = [] if held_out is None else finite_batches(held_out)
    stages = stage_map or StageMap(type(network).__name__, ())
    with (
        _frozen_but(network, tensors),
        ready_to_train(network, stages, stream.first, loss, teacher, seed, duration, started) as ready,
    ):
        objective, stop = ready
        trainer = Trainer(
            objective,
            tensors,
            stream,
            duration,
            seed=seed,
            resume_from=None,
            run_id="",
            started=started,
            held_out=judged,
            phases=[Phase("training", patience=patience)],
        )
        finished = trainer.train(stop)
    if not finished:
        warnings.warn("training was stopped: the network has the best weights so far", stacklevel=3)
    elif not trainer.run.step:
        warnings.warn("there was no time for a step: the network is as it was; give more minutes", stacklevel=3)
    return finished


@contextmanager
def ready_to_train(
    network: nn.Module,
    stage_map: StageMap,
    batch: Batch,
    loss: Loss | None,
    teacher: nn.Module | None,
    seed: int,
    duration: Duration,
    started: float,
    recompute: bool = False,
) -> Iterator[tuple[Distillation | Supervised, threading.Event]]:
    """Within the block, the networks are as they train: in ``eval()``, as fast as they run, seeded, interruptible.

    Args:
        network, teacher: as for :func:`fit`.
        stage_map: where the stages of both are.
        batch: the first batch.
        loss: as for :func:`fit`; it or a teacher must be given.
        duration: how long they train. If the start took a tenth of its minutes, no faster format is tried out.
        started: when it began, by ``time.monotonic()``.
        recompute: run the stages again in the backward pass, to save memory.

    Yields:
        What to minimise, and the event that Ctrl-C sets.
    """
    with ExitStack() as stack:
        if duration.minutes and all(parameter.device.type == "cpu" for parameter in network.parameters()):
            stack.enter_context(helpful_threads())
        stack.enter_context(evaluating(network))
        recomputed = [denoiser_at(network, site) for site in stage_map.sites] if recompute else []
        objective: Distillation | Supervised
        if teacher is not None:
            stack.enter_context(evaluating(teacher))
            objective = Distillation(network, teacher, Observer(teacher, stage_map, batch), loss, recomputed)
        else:
            assert loss is not None
            objective = Supervised(network, Observer(network, stage_map, batch), loss, recomputed)
        stop = stack.enter_context(interruptible())
        if not is_later(duration, started, SLOW_START):
            stack.enter_context(channels_last(objective, batch, seed))
        stack.enter_context(seeded(seed))
        yield objective, stop


def is_later(duration: Duration, started: float, fraction: float) -> bool:
    """Whether this fraction of the minutes is over; the main process decides for all."""
    over = duration.minutes is not None and time.monotonic() - started > fraction * 60 * duration.minutes
    return broadcast(over)


def check_target(loss: Loss | None, teacher: nn.Module | None) -> None:
    """Refuse to train without a target.

    Raises:
        LoRunError: neither a loss nor a teacher is given.
    """
    if loss is None and teacher is None:
        raise LoRunError("there is nothing to minimise: give loss= for batches with ground truth, or teacher=")


def finite_batches(held_out: Iterable[Any]) -> list[Batch]:
    """The held-out batches without NaN or Inf: each once, or the first two where their number is not known.

    Raises:
        LoRunError: there is none.
    """
    count = operator.length_hint(held_out, HELD_OUT)
    judged = [batch for batch in itertools.islice(Batches(held_out), count) if is_finite(batch)]
    if not judged:
        raise LoRunError("all held-out batches have NaN or Inf: pass others")
    return judged


def _trained(network: nn.Module, trained: Iterable[tuple[nn.Parameter, float]] | None) -> list[TrainedTensor]:
    if trained is None:
        trained = [(parameter, RATE) for parameter in network.parameters() if parameter.requires_grad]
    tensors, sizes = [], sizes_of_zeros(network)
    for parameter, rate in trained:
        if not parameter.requires_grad:
            raise LoRunError(
                f"a parameter of shape {tuple(parameter.shape)} that is to be trained is frozen: call "
                "requires_grad_(True) on it first"
            )
        if not (is_number(rate) and rate > 0):
            raise LoRunError(f"expected learning rates above 0, found {rate!r}: pass (parameter, rate) pairs")
        tensors.append(TrainedTensor(parameter, rate, sizes.get(id(parameter), 0.0)))
    if len({id(item.parameter) for item in tensors}) < len(tensors):
        raise LoRunError("a parameter is to be trained twice: list each once")
    if not tensors:
        raise LoRunError(f"there is nothing to train: no parameter of {type(network).__name__} has requires_grad")
    return tensors


def _check_stages(network: nn.Module, stage_map: StageMap | None) -> None:
    for site in stage_map.sites if stage_map else ():
        try:
            network.get_submodule(site.module)
        except AttributeError as error:
            raise LoRunError(
                f"{type(network).__name__} has no module {site.module!r}, where stage_map has a stage: pass a network "
                "built like the teacher, or no stage_map"
            ) from error


@contextmanager
def _frozen_but(network: nn.Module, trained: Iterable[TrainedTensor]) -> Iterator[None]:
    """Within the block, the parameters of ``network`` that are not trained are frozen."""
    kept = {id(item.parameter) for item in trained}
    frozen = [parameter for parameter in network.parameters() if parameter.requires_grad and id(parameter) not in kept]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)

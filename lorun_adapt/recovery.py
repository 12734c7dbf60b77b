"""Give a converted network the quality of its original back: distil that into it, from measurements alone."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .assemble import StageAdapter, distinct_tensors, held_tensors, lowrank_terms
from .budget import Budget
from .calibration import Batch, Batches, is_finite
from .distill import Distillation, Loss
from .errors import LoRunError
from .fingerprint import fingerprint_of
from .lowrank import is_base
from .observe import Observer
from .progress import progress
from .refit import refit
from .seeds import seeded
from .sensitivity import Sensitivity, sensitivities
from .speed import channels_last
from .stages import StageMap, tensors_of
from .training import Trained, Trainer, interruptible

if TYPE_CHECKING:
    from .model import LoRunModel

PROBES = 20  # batches on which it is measured what the output is sensitive to
DAMPINGS = (0.01, 0.1, 1.0)  # tried for the factorisation: small ones hold where little is lost, large ones elsewhere
# Learning rates, relative to the size of a tensor's values. What stands in every stage, and what
# is not a stage's to change, moves less.
FACTORS, BASE, PRIVATE, OUTSIDE = 0.05, 0.03, 0.01, 0.003


def recover(
    lorun: LoRunModel,
    teacher: nn.Module,
    calibration: Batches,
    budget: Budget,
    *,
    loss: Loss | None = None,
    checkpoint: Path | None = None,
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
                if checkpoint is None or not checkpoint.exists():
                    start_near(distillation, lorun, teacher, calibration, seed, stop)
                else:
                    _probes(calibration)  # drawn then too
                trainer = Trainer(
                    distillation,
                    trained,
                    calibration,
                    budget,
                    seed=seed,
                    checkpoint=checkpoint,
                    kind=f"{lorun.stage_map.network} {fingerprint_of(distinct_tensors(teacher))}",
                    spent=time.monotonic() - started,
                )
                finished = trainer.train(stop)
    finally:
        now = _fingerprints(lorun)
        if now[0] != before[0]:
            lorun._fingerprint = None
        if now != before:  # what was measured was so of other weights
            lorun.set_config = {n: dataclasses.replace(about, measured=()) for n, about in lorun.set_config.items()}
    if not finished:
        warnings.warn("recovery was stopped: the network has the best weights so far", stacklevel=3)
    return finished


def _fingerprints(lorun: LoRunModel) -> tuple[str, str]:
    """Of the base as it is in memory, and of all of it: with the adapters, and what sets have outside the stages."""
    return fingerprint_of(distinct_tensors(lorun.base)), fingerprint_of(lorun.state_dict())


def start_near(
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


def check_teacher(teacher: nn.Module, lorun: LoRunModel) -> None:
    if not isinstance(teacher, nn.Module):
        raise LoRunError(
            f"expected the original network as teacher, found {type(teacher).__name__}: pass the nn.Module"
        )
    held, wanted = ({n: tuple(t.shape) for n, t, _ in tensors_of(net)} for net in (teacher, lorun.base))
    for name in (*wanted, *held):
        if held.get(name) != wanted.get(name):
            raise LoRunError(
                f"expected the network that was converted as teacher, found {name!r} of shape {held.get(name)} in "
                f"{type(teacher).__name__} and {wanted.get(name)} in the conversion: pass the original, not wrapped"
            )


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """``eval()`` within the block, and each module's own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def trained_of(adapters: nn.Module, factors: float) -> list[Trained]:
    """What trains of the adapters in a set, or in all sets; ``factors``: the learning rate of low-rank factors."""
    found = []
    for adapter in adapters.modules():
        if isinstance(adapter, StageAdapter):
            own = {id(p) for term in lowrank_terms(adapter).values() for p in term.parameters()}
            found += [Trained(p, factors if id(p) in own else PRIVATE) for p in adapter.parameters() if p.requires_grad]
    return found


def check_any(trained: list[Trained]) -> None:
    if not trained:
        raise LoRunError("expected tensors to train, found none: the network's stages hold none of their own")


@contextmanager
def trainable(lorun: LoRunModel) -> Iterator[list[Trained]]:
    """What recovery trains: the adapters, and of the base what runs. The base is frozen again afterwards."""
    trained = [*trained_of(lorun.adapters, FACTORS), *trained_of(lorun.outside, FACTORS)]
    own = {id(p) for sets in (lorun.adapters, lorun.outside) for p in sets.parameters()}
    names: dict[int, set[str]] = {}
    for name, p in lorun.base.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), set()).add(name)
    base = []
    held = {id(tensor) for tensor in held_tensors(lorun.base, lorun.stage_map).values()}
    for name, p in lorun.network.named_parameters():
        floats = p.is_floating_point() or p.is_complex()
        if id(p) in held - own and floats and (not lorun.trainable or lorun.trainable & names[id(p)]):
            base.append(p)
            trained.append(Trained(p, BASE if is_base(name) else OUTSIDE))
    check_any(trained)
    for parameter in base:
        parameter.requires_grad_(True)
    try:
        yield trained
    finally:
        for parameter in base:
            parameter.requires_grad_(False)

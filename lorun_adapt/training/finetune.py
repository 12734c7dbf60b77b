"""Train a new adapter set on a frozen base, for example for another noise level."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..network.batches import HELD_OUT, Batches
from ..network.converted import AdapterSet, Converted
from ..stages.stage_map import StageMap
from ..stages.tensors import outside_parameters
from ..util.fingerprint import fingerprint_of
from ..util.modules import unchanged
from ..util.seeds import seeded
from .distill import Loss, check_teacher
from .duration import Duration
from .fit import check_target, finite_batches, ready_to_train
from .run import Phase
from .trained import check_not_empty, names_matching, tensors_to_train
from .trainer import Trainer

TERM_RATE = 0.02  # relative learning rate of terms; lower than for recovery, since they start from a trained set
PATIENCE = 10  # training ends after this many checks of the held-out batches (of 25) without improvement


def finetune(
    converted: Converted,
    network: nn.Module,
    batches: Iterable[Any],
    adapter_name: str,
    duration: Duration,
    *,
    loss: Loss | None,
    teacher: nn.Module | None,
    held_out: Iterable[Any] | None,
    recompute: bool,
    resume_from: Path | None,
    seed: int,
) -> bool:
    """Train only the set ``adapter_name``, which must be active; see :meth:`LoRunModel.finetune`.

    Args:
        converted: the network as data.
        network: the same network assembled, with the same tensors.
        batches: batches to train on.
        adapter_name: the set.
        duration: how long to train.
        loss, teacher: what to minimise; give at least one.
        held_out: batches to judge by.
        recompute: run the stages again in the backward pass, to save memory.
        resume_from: the state file.
        seed: seed of all random numbers.

    Returns:
        True if training finished, False if Ctrl-C stopped it.
    """
    started = time.monotonic()
    check_target(loss, teacher)
    with seeded(seed):
        kept, stream = _split(batches) if held_out is None else (held_out, batches)
        training = Batches(stream)
        judged = finite_batches(kept)
    held = converted.sets[adapter_name]
    trained = tensors_to_train(network, held, TERM_RATE)
    check_not_empty(trained)
    initial = _tensors_of(held)
    if teacher is not None:
        check_teacher(teacher, converted.base)
    networks = [network] if teacher is None else [network, teacher]
    parameters = [parameter for module in networks for parameter in module.parameters()]  # no step changes the frozen
    with (
        unchanged(networks, but=parameters),
        ready_to_train(
            network, converted.stage_map, training.first, loss, teacher, seed, duration, started, recompute
        ) as (objective, stop),
    ):
        trainer = Trainer(
            objective,
            trained,
            training,
            duration,
            seed=seed,
            resume_from=resume_from,
            run_id=f"{adapter_name} for {held.info.noise}, begun as {fingerprint_of(initial)}, "
            f"on {converted.fingerprint}",
            started=started,
            held_out=judged,
            phases=[Phase(f"fine-tuning {adapter_name}", patience=PATIENCE)],
            restored=list(initial.values()),
        )
        finished = trainer.train(stop)
    if not finished:
        warnings.warn("fine-tuning was stopped: the best weights so far are kept", stacklevel=4)
    elif not trainer.run.step:
        warnings.warn("there was no time for a step: the set is as it began; give more minutes", stacklevel=4)
    return finished


def _tensors_of(held: AdapterSet) -> dict[str, Tensor]:
    """Return all tensors of a set, by names that are the same in every run."""
    adapters = {f"{stage}.{group}": a for stage, groups in sorted(held.adapters.items()) for group, a in groups.items()}
    tensors = {f"{place}.{name}": t for place, adapter in adapters.items() for name, t in adapter.state_dict().items()}
    return tensors | {f"outside.{name}": tensor.detach() for name, tensor in held.outside.items()}


def _split(batches: Iterable[Any]) -> tuple[Iterable[Any], Iterable[Any]]:
    """Split batches into those to judge by and those to train on.

    They are disjoint if ``batches`` is a long enough sequence. From an iterator, the first batches are taken out. What
    is shorter repeats, so it is trained on completely, with a warning.
    """
    if isinstance(batches, Iterator):
        kept, further = list(itertools.islice(batches, HELD_OUT)), list(itertools.islice(batches, 1))
        if further:
            return kept, itertools.chain(further, batches)
        batches = kept or iter(kept)  # without any, what draws them says so
    if isinstance(batches, Sequence) and not isinstance(batches, str) and len(batches) > HELD_OUT + 1:
        return batches[:HELD_OUT], batches[HELD_OUT:]
    if isinstance(batches, Sized):
        warnings.warn(
            "no batches are held out, because batches is short or cannot be sliced: pass held_out=, or the set may end "
            "worse than it started",
            stacklevel=5,
        )
    stream = Batches(batches)
    return list(itertools.islice(stream, HELD_OUT)), stream


def matching_parameters(base: nn.Module, stage_map: StageMap, patterns: str | Iterable[str]) -> dict[str, Tensor]:
    """Return copies of the parameters outside the stages that match glob patterns, by name.

    Raises:
        LoRunError: a pattern that matches no parameter.
    """
    parameters = outside_parameters(base, stage_map)
    return {name: parameters[name].detach().clone() for name in names_matching(parameters, patterns)}

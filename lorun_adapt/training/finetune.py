"""Train a new adapter set on a frozen base, for measurements with other noise."""

from __future__ import annotations

import fnmatch
import itertools
import time
import warnings
from collections.abc import Iterable, Sequence, Sized
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import LoRunError
from ..network.batches import Batches
from ..network.converted import AdapterSet, Converted
from ..stages.stage_map import StageMap
from ..stages.tensors import outside_parameters
from ..util.fingerprint import fingerprint_of
from ..util.seeds import seeded
from .distill import Loss, check_teacher
from .duration import Duration
from .fit import check_target, finite_batches, ready_to_train
from .trained import check_not_empty, tensors_to_train
from .trainer import HELD_OUT, Trainer

TERM_RATE = 0.02  # learning rate relative to the size of a tensor's values: it starts from where others are good
PATIENCE = 10  # checks of the held-out batches, of 25, without a better one, after which it ends


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
    resume_from: Path | None,
    seed: int,
) -> bool:
    """Train the set ``adapter_name``, which runs, and nothing else; see :meth:`LoRunModel.finetune`.

    Args:
        network: the network that runs, around the tensors of ``converted``.
    """
    started = time.monotonic()
    check_target(loss, teacher)
    with seeded(seed):
        kept, stream = _split(batches) if held_out is None else (held_out, batches)
        training = Batches(stream)
        judged = finite_batches(kept)
    held = converted.sets[adapter_name]
    trained = tensors_to_train(held, TERM_RATE)
    check_not_empty(trained)
    begun = _tensors_of(held)
    if teacher is not None:
        check_teacher(teacher, converted.base)
    with ready_to_train(network, converted.stage_map, training.first, loss, teacher, seed) as (objective, stop):
        trainer = Trainer(
            objective,
            trained,
            training,
            duration,
            seed=seed,
            resume_from=resume_from,
            run_id=f"{adapter_name} for {held.info.noise}, begun as {fingerprint_of(begun)}, "
            f"on {converted.fingerprint}",
            spent=time.monotonic() - started,
            held_out=judged,
            patience=PATIENCE,
            label=f"fine-tuning {adapter_name}",
            restored=list(begun.values()),
        )
        finished = trainer.train(stop)
    if not finished:
        warnings.warn("fine-tuning was stopped: the set has the best weights so far", stacklevel=3)
    return finished


def _tensors_of(held: AdapterSet) -> dict[str, Tensor]:
    """All tensors of a set, by a name that is the same in each run."""
    adapters = {f"{stage}.{group}": a for stage, groups in sorted(held.adapters.items()) for group, a in groups.items()}
    tensors = {f"{place}.{name}": t for place, adapter in adapters.items() for name, t in adapter.state_dict().items()}
    return tensors | {f"outside.{name}": tensor.detach() for name, tensor in held.outside.items()}


def _split(batches: Iterable[Any]) -> tuple[Iterable[Any], Iterable[Any]]:
    """What to judge by, and what to train on: apart where it is known what is there."""
    if isinstance(batches, Sequence) and not isinstance(batches, str) and len(batches) > HELD_OUT + 1:
        return batches[:HELD_OUT], batches[HELD_OUT:]
    if isinstance(batches, Sized):
        warnings.warn(
            "no batches are held out, as these are trained on again and again: pass held_out= with others, or the set "
            "may end worse than it began",
            stacklevel=4,
        )
    stream = Batches(batches)
    return list(itertools.islice(stream, HELD_OUT)), stream


def matching(base: nn.Module, stage_map: StageMap, patterns: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the parameters outside the stages that match glob patterns, by name.

    Raises:
        LoRunError: a pattern that matches none.
    """
    parameters = outside_parameters(base, stage_map)
    copies = {}
    for pattern in patterns:
        names = fnmatch.filter(parameters, pattern)
        if not names:
            raise LoRunError(
                f"no parameter outside the stages matches {pattern!r}: they are {list(parameters)}, and those of the "
                "stages belong to each set anyway"
            )
        copies.update({name: parameters[name].detach().clone() for name in names})
    return copies

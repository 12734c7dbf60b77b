"""Train a new adapter set on a frozen base, for measurements with other noise."""

from __future__ import annotations

import fnmatch
import itertools
import operator
import time
import warnings
from collections.abc import Iterable, Sequence, Sized
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import LoRunError
from ..network.batches import Batches, is_finite
from ..network.converted import AdapterSet, Converted
from ..network.observe import Observer
from ..stages.stage_map import StageMap
from ..stages.tensors import outside_parameters
from ..util.fingerprint import fingerprint_of
from ..util.modules import evaluating
from ..util.seeds import seeded
from .distill import Distillation, Loss, check_teacher
from .duration import Duration
from .speed import channels_last
from .supervised import Supervised
from .trained import check_not_empty, tensors_to_train
from .trainer import HELD_OUT, Trainer, interruptible

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
    if loss is None and teacher is None:
        raise LoRunError("there is nothing to minimise: give loss= for batches with the truth, or teacher=")
    with seeded(seed):
        kept, stream = _split(batches) if held_out is None else (held_out, batches)
        training = Batches(stream)
        count = operator.length_hint(kept, HELD_OUT)
        judged = [batch for batch in itertools.islice(Batches(kept), count) if is_finite(batch)]
    if not judged:
        raise LoRunError("all held-out batches hold NaN or Inf: pass finite ones")
    held = converted.sets[adapter_name]
    trained = tensors_to_train(held, TERM_RATE)
    check_not_empty(trained)
    begun = _tensors_of(held)
    with ExitStack() as stack:
        stack.enter_context(evaluating(network))
        objective: Distillation | Supervised
        if teacher is not None:
            check_teacher(teacher, converted.base)
            stack.enter_context(evaluating(teacher))
            objective = Distillation(network, teacher, Observer(teacher, converted.stage_map, training.first), loss)
        else:
            assert loss is not None
            objective = Supervised(network, Observer(network, converted.stage_map, training.first), loss)
        stop = stack.enter_context(interruptible())
        stack.enter_context(channels_last(objective, training.first, seed))
        stack.enter_context(seeded(seed))
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


def matching_parameters(base: nn.Module, stage_map: StageMap, patterns: Iterable[str]) -> dict[str, Tensor]:
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

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
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import LoRunError
from ..network.batches import Batches, is_finite
from ..network.observe import Observer
from ..stages.tensors import outside_parameters
from ..util.fingerprint import fingerprint_of
from ..util.modules import distinct_tensors, evaluating
from ..util.seeds import seeded
from .distill import Distillation, Loss, check_teacher
from .duration import Duration
from .speed import channels_last
from .supervised import Supervised
from .trained import check_not_empty, tensors_to_train
from .trainer import HELD_OUT, Trainer, interruptible

if TYPE_CHECKING:
    from ..model.lorun_model import LoRunModel

FACTORS = 0.02  # learning rate relative to the size of a tensor's values: it starts from where others are good
PATIENCE = 10  # checks of the held-out batches, of 25, without a better one, after which it ends


def finetune(
    lorun: LoRunModel,
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
    """Train the set ``adapter_name``, which runs, and nothing else; see :meth:`LoRunModel.finetune`."""
    started = time.monotonic()
    if loss is None and teacher is None:
        raise LoRunError("expected a loss with the truth, or a teacher, found neither: give loss= or teacher=")
    with seeded(seed):
        kept, stream = _split(batches) if held_out is None else (held_out, batches)
        training = Batches(stream)
        count = operator.length_hint(kept, HELD_OUT)
        judged = [batch for batch in itertools.islice(Batches(kept), count) if is_finite(batch)]
    if not judged:
        raise LoRunError("expected finite batches to hold out, found NaN or Inf in all of them: mend them")
    parts = [held[adapter_name] for held in (lorun.adapters, lorun.outside) if adapter_name in held]
    trained = [item for part in parts for item in tensors_to_train(part, FACTORS)]
    check_not_empty(trained)
    begun = {f"{place}.{name}": t for place, part in enumerate(parts) for name, t in part.state_dict().items()}
    with ExitStack() as stack:
        stack.enter_context(evaluating(lorun))
        if teacher is None:
            observer = Observer(lorun, lorun.stage_map, training.first)
            distillation: Distillation | Supervised = Supervised(lorun, observer, loss)
        else:
            check_teacher(teacher, lorun)
            stack.enter_context(evaluating(teacher))
            distillation = Distillation(lorun, teacher, Observer(teacher, lorun.stage_map, training.first), loss)
        stop = stack.enter_context(interruptible())
        stack.enter_context(channels_last(distillation, training.first, seed))
        stack.enter_context(seeded(seed))
        trainer = Trainer(
            distillation,
            trained,
            training,
            duration,
            seed=seed,
            resume_from=resume_from,
            run_id=f"{adapter_name} for {lorun.adapter_info[adapter_name].noise_schedule}, begun as "
            f"{fingerprint_of(begun)}, on {fingerprint_of(distinct_tensors(lorun.base))}",
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


def matching(lorun: LoRunModel, patterns: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the parameters outside the stages that match glob patterns, by name.

    Raises:
        LoRunError: a pattern that matches none.
    """
    every = outside_parameters(lorun.base, lorun.stage_map)
    found = {}
    for pattern in patterns:
        names = fnmatch.filter(every, pattern)
        if not names:
            raise LoRunError(
                f"expected parameters outside the stages that match {pattern!r}, found none among {list(every)}: those "
                "of the stages are a set's own as it is"
            )
        found.update({name: every[name].detach().clone() for name in names})
    return found

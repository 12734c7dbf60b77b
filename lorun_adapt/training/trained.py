"""."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..errors import LoRunError
from ..network.adapted import is_base
from ..network.adapter import StageAdapter, lowrank_terms
from ..stages.tensors import base_tensors

if TYPE_CHECKING:
    from ..model.lorun_model import LoRunModel


# Learning rates, relative to the size of a tensor's values. What stands in every stage, and what
# is not a stage's to change, moves less.
FACTORS, BASE, PRIVATE, OUTSIDE = 0.05, 0.03, 0.01, 0.003


def tensors_to_train(adapters: nn.Module, factors: float) -> list[TrainedTensor]:
    """What trains of the adapters in a set, or in all sets; ``factors``: the learning rate of low-rank factors."""
    found = []
    for adapter in adapters.modules():
        if isinstance(adapter, StageAdapter):
            own = {id(p) for term in lowrank_terms(adapter).values() for p in term.parameters()}
            found += [
                TrainedTensor(p, factors if id(p) in own else PRIVATE) for p in adapter.parameters() if p.requires_grad
            ]
    return found


def check_not_empty(trained: list[TrainedTensor]) -> None:
    if not trained:
        raise LoRunError("expected tensors to train, found none: the network's stages hold none of their own")


@contextmanager
def trainable(lorun: LoRunModel) -> Iterator[list[TrainedTensor]]:
    """What recovery trains: the adapters, and of the base what runs. The base is frozen again afterwards."""
    trained = [*tensors_to_train(lorun.adapters, FACTORS), *tensors_to_train(lorun.outside, FACTORS)]
    own = {id(p) for sets in (lorun.adapters, lorun.outside) for p in sets.parameters()}
    names: dict[int, set[str]] = {}
    for name, p in lorun.base.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), set()).add(name)
    base = []
    held = {id(tensor) for tensor in base_tensors(lorun.base, lorun.stage_map).values()}
    for name, p in lorun.network.named_parameters():
        floats = p.is_floating_point() or p.is_complex()
        if id(p) in held - own and floats and (not lorun.trainable or lorun.trainable & names[id(p)]):
            base.append(p)
            trained.append(TrainedTensor(p, BASE if is_base(name) else OUTSIDE))
    check_not_empty(trained)
    for parameter in base:
        parameter.requires_grad_(True)
    try:
        yield trained
    finally:
        for parameter in base:
            parameter.requires_grad_(False)


@dataclass(frozen=True)
class TrainedTensor:
    """A tensor to train, and its learning rate relative to the size of its values."""

    parameter: nn.Parameter
    rate: float

"""The tensors to train, and their learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import LoRunError
from ..network.adapted import is_base
from ..network.adapter import StageAdapter, terms_of
from ..network.converted import AdapterSet, Converted
from ..stages.tensors import base_tensors
from ..util.numbers import is_numeric

# Learning rates relative to the size of a tensor's values. The base moves more slowly than the terms because it affects
# every stage; parameters outside the stages and private tensors move most slowly.
TERM_RATE, BASE_RATE, PRIVATE_RATE, OUTSIDE_RATE = 0.05, 0.03, 0.01, 0.003


@dataclass(frozen=True)
class TrainedTensor:
    """A tensor to train, and its learning rate relative to the size of its values."""

    parameter: nn.Parameter
    rate: float


def tensors_to_train(held: AdapterSet, term_rate: float = TERM_RATE) -> list[TrainedTensor]:
    """Return the trainable tensors of a set: its terms, private tensors, and parameters outside the stages.

    Args:
        held: the set.
        term_rate: the relative learning rate of terms.
    """
    adapters = [adapter for _, stage in sorted(held.adapters.items()) for adapter in stage.values()]
    tensors = [item for adapter in adapters for item in _of_adapter(adapter, term_rate)]
    return tensors + [TrainedTensor(p, PRIVATE_RATE) for p in _trainable(held.outside.values())]


def _of_adapter(adapter: StageAdapter, term_rate: float) -> Iterable[TrainedTensor]:
    in_terms = {id(parameter) for term in terms_of(adapter).values() for parameter in term.parameters()}
    for parameter in _trainable(adapter.parameters()):
        yield TrainedTensor(parameter, term_rate if id(parameter) in in_terms else PRIVATE_RATE)


def _trainable(tensors: Iterable[Tensor]) -> list[nn.Parameter]:
    return [tensor for tensor in tensors if isinstance(tensor, nn.Parameter) and tensor.requires_grad]


def check_not_empty(trained: list[TrainedTensor]) -> None:
    """Raise an error if there is no tensor to train.

    Raises:
        LoRunError: ``trained`` is empty.
    """
    if not trained:
        raise LoRunError("there is nothing to train: the stages have no trainable parameters")


@contextmanager
def trainable_base(converted: Converted, network: nn.Module) -> Iterator[list[TrainedTensor]]:
    """Within the ``with`` block, make the base trainable; yield the tensors that recovery trains.

    These are the tensors of all sets, and the parameters of the base that the assembled network uses.

    Args:
        converted: the network as data.
        network: the same network assembled, with the same tensors.
    """
    trained = [item for held in converted.sets.values() for item in tensors_to_train(held)]
    of_sets = {id(tensor) for held in converted.sets.values() for tensor in _tensors_of(held)}
    names: dict[int, set[str]] = {}
    for name, parameter in converted.base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    of_base = {id(tensor) for tensor in base_tensors(converted.base, converted.stage_map).values()} - of_sets
    authors_train = converted.trainable_names
    base = []
    for name, parameter in network.named_parameters():
        if id(parameter) in of_base and is_numeric(parameter):
            if not authors_train or authors_train & names[id(parameter)]:
                base.append(parameter)
                trained.append(TrainedTensor(parameter, BASE_RATE if is_base(name) else OUTSIDE_RATE))
    check_not_empty(trained)
    for parameter in base:
        parameter.requires_grad_(True)
    try:
        yield trained
    finally:
        for parameter in base:
            parameter.requires_grad_(False)


def _tensors_of(held: AdapterSet) -> Iterator[Tensor]:
    yield from held.outside.values()
    for stage in held.adapters.values():
        for adapter in stage.values():
            yield from adapter.parameters()

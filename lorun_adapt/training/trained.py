"""The tensors to train, and their learning rates."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import Tensor, nn

from ..errors import LoRunError
from ..network.adapted import adapted_parameters, is_base
from ..network.adapter import StageAdapter, terms_of
from ..network.converted import AdapterSet, Converted
from ..stages.tensors import base_tensors, outside_parameters
from ..util.numbers import is_numeric

# Learning rates relative to the size of a tensor's values. The base moves more slowly than the terms because it affects
# every stage; parameters outside the stages and private tensors move most slowly.
TERM_RATE, BASE_RATE, PRIVATE_RATE, OUTSIDE_RATE = 0.05, 0.03, 0.01, 0.003


@dataclass(frozen=True)
class TrainedTensor:
    """A tensor to train.

    Attributes:
        parameter: the tensor.
        rate: its learning rate relative to the size of its values.
        size: what the root mean square of its values is taken to be while they are all zero.
        beside: tensors without which its values mean nothing, such as their places. No step changes them.
    """

    parameter: nn.Parameter
    rate: float
    size: float = 0.0
    beside: tuple[Tensor, ...] = ()


def tensors_to_train(network: nn.Module, held: AdapterSet, term_rate: float = TERM_RATE) -> list[TrainedTensor]:
    """Return the trainable tensors of a set: its terms, private tensors, and parameters outside the stages.

    Args:
        network: the network, assembled with the set.
        held: the set.
        term_rate: the relative learning rate of terms.
    """
    sizes = sizes_of_zeros(network)
    trained = _of_adapters(held, term_rate) + [
        TrainedTensor(p, PRIVATE_RATE) for p in _trainable(held.outside.values())
    ]
    return [replace(item, size=sizes.get(id(item.parameter), 0.0)) for item in trained]


def sizes_of_zeros(network: nn.Module) -> dict[int, float]:
    """Return what the size of parameters of terms that are all zero is taken to be, by their id.

    Args:
        network: any network; without terms, there are none.
    """
    sizes: dict[int, float] = {}
    for base, term in adapted_parameters(network):
        found = term.sizes_of_zeros(base.detach())
        sizes |= {id(term.get_parameter(name)): size for name, size in found.items()}
    return sizes


def names_matching(parameters: Mapping[str, nn.Parameter], patterns: str | Iterable[str]) -> list[str]:
    """Return the names of parameters outside the stages that match a glob pattern, or one of several.

    Raises:
        LoRunError: a pattern that matches no parameter.
    """
    names: dict[str, None] = {}
    if not isinstance(patterns, Iterable):
        raise LoRunError(
            f"expected patterns of parameters outside the stages, found {patterns!r}: choose from {list(parameters)}"
        )
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = fnmatch.filter(parameters, pattern)
        if not found:
            raise LoRunError(
                f"no parameter outside the stages matches {pattern!r}: choose from {list(parameters)} (parameters of "
                "the stages belong to every set)"
            )
        names |= dict.fromkeys(found)
    return list(names)


def _of_adapters(held: AdapterSet, term_rate: float) -> list[TrainedTensor]:
    adapters = [adapter for _, stage in sorted(held.adapters.items()) for adapter in stage.values()]
    return [item for adapter in adapters for item in _of_adapter(adapter, term_rate)]


def _of_adapter(adapter: StageAdapter, term_rate: float) -> Iterable[TrainedTensor]:
    term_of = {id(parameter): term for term in terms_of(adapter).values() for parameter in term.parameters()}
    for parameter in _trainable(adapter.parameters()):
        if (term := term_of.get(id(parameter))) is None:
            yield TrainedTensor(parameter, PRIVATE_RATE)
        else:
            state = term.state_dict(keep_vars=True).values()
            beside = tuple(tensor for tensor in state if not isinstance(tensor, nn.Parameter))
            yield TrainedTensor(parameter, term_rate, beside=beside)


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
def trainable_base(
    converted: Converted, network: nn.Module, also: str | Collection[str] = ()
) -> Iterator[list[TrainedTensor]]:
    """Within the ``with`` block, make the base trainable; yield the tensors that recovery trains.

    These are the adapters of all sets, the base of the stages that the assembled network uses, and the parameters
    outside the stages that are named.

    Args:
        converted: the network as data.
        network: the same network assembled, with the same tensors.
        also: glob patterns of parameters outside the stages.

    Raises:
        LoRunError: a pattern that matches no parameter; nothing to train.
    """
    trained = [item for held in converted.sets.values() for item in _of_adapters(held, TERM_RATE)]
    named = set(names_matching(outside_parameters(converted.base, converted.stage_map), also))
    outside = {id(tensor) for held in converted.sets.values() for name, tensor in held.outside.items() if name in named}
    outside |= {id(tensor) for name, tensor in converted.base.named_parameters() if name in named}
    shared = {id(tensor) for tensor in base_tensors(converted.base, converted.stage_map).values()}
    names: dict[int, set[str]] = {}
    for name, parameter in converted.base.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    bases = {id(p) for name, p in network.named_parameters(remove_duplicate=False) if is_base(name)}
    authors_train = converted.trainable_names
    frozen = []
    for parameter in network.parameters():
        in_base, is_named = id(parameter) in bases & shared, id(parameter) in outside
        in_base = in_base and (not authors_train or bool(authors_train & names[id(parameter)]))
        if (in_base or is_named) and is_numeric(parameter):
            trained.append(TrainedTensor(parameter, BASE_RATE if in_base else OUTSIDE_RATE))
            if not parameter.requires_grad:
                frozen.append(parameter)
    check_not_empty(trained)
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield trained
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)

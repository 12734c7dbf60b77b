"""What a network gives at its end and at its stages, and which of that counts.

Outputs are caught where the stages are, so networks that are compared must be put together alike: the
original and its conversion. A stage may also return what no later stage reads (symmetry residuals,
logs). That is left out: it says nothing about the images, and where it is nearly zero its relative
error would drown everything else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..errors import LoRunError
from ..stages.stage_map import StageMap
from ..util.modules import copy_network
from ..util.nested import device_of, tensors_in, to_device
from ..util.seeds import seeded

Edge = tuple[Any, int]  # where a tensor stands in autograd's graph: (node, which output of it)


class Outputs(NamedTuple):
    """What a forward gave: everything, the tensors that count in it, and those that the stages hand on."""

    whole: Any
    final: list[Tensor]
    stages: list[Tensor]


class Caught(NamedTuple):
    """What one call of a stage returned: copies, as the network may go on to change its tensors in place."""

    group: str
    tensors: list[Tensor]
    edges: list[Edge | None]


class Observer:
    """Runs networks that are put together like ``teacher``, and picks out what counts.

    Args:
        stage_map: where the stages are.
        batch: arguments of the forward, on which it is found what counts.

    Raises:
        LoRunError: a batch that the network does not run on, or an output without numbers.
    """

    def __init__(self, teacher: nn.Module, stage_map: StageMap, batch: tuple[Any, ...]) -> None:
        self._groups = {site.module: group.name for group in stage_map.groups for site in group.sites}
        self._num_arguments = num_positional_arguments(teacher)
        self._final, self._handed_on = self._relevant(teacher, batch)

    def run(self, network: nn.Module, batch: tuple[Any, ...], seed: int) -> Outputs:
        """The outputs for a copy of ``batch``; the random numbers that the network draws start from ``seed``."""
        with catching(network, self._groups) as caught, seeded(seed):
            output = network(*to_device(batch[: self._num_arguments], device_of(network)))
        final = tensors_in(output)
        stages = [call.tensors[i] for call, kept in zip(caught, self._handed_on) for i in kept]
        return Outputs(output, [final[i] for i in self._final], stages)

    def _relevant(self, teacher: nn.Module, batch: tuple[Any, ...]) -> tuple[list[int], list[list[int]]]:
        """Which tensors count, by position: in the final output, and in what each call of a stage returns.

        Of a stage's, those from which later outputs of stages are computed, and of the final output's
        those that are computed from the last of these.
        """
        twin = copy_network(teacher)
        for parameter in twin.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        with torch.enable_grad(), catching(twin, self._groups) as caught, seeded(0):
            try:
                final = tensors_in(twin(*to_device(batch[: self._num_arguments], device_of(twin))))
            except Exception as error:
                raise LoRunError(
                    f"expected {type(twin).__name__} to run on the first batch of calibration, found "
                    f"{type(error).__name__}: {error}; have calibration yield the arguments of its forward"
                ) from error
        if not final:
            raise LoRunError(
                f"expected {type(twin).__name__} to return tensors of floating-point numbers, found none: there is "
                "nothing to distil"
            )
        seen = [_ancestors(call.edges) for call in caught]  # in the order in which they ran
        handed_on: list[list[int]] = []
        latest: dict[str, list[int]] = {}
        for place, call in enumerate(caught):
            later = set().union(*seen[place + 1 :])
            read = [i for i, edge in enumerate(call.edges) if edge in later]
            # Nothing is computed from the last stage but the output, of which what it merely logs is a part too.
            read = read or [i for i in latest.get(call.group, range(len(call.edges))) if i < len(call.edges)]
            handed_on.append(read)
            latest[call.group] = read
        last = {caught[-1].edges[i] for i in handed_on[-1]} if caught else set()
        counts = [i for i, tensor in enumerate(final) if last & _ancestors([_edge(tensor)])]
        return counts or list(range(len(final))), handed_on


@contextmanager
def catching(network: nn.Module, places: Mapping[str, str]) -> Iterator[list[Caught]]:
    """Within the block, what the stages return, in the order of their calls.

    Args:
        places: the module of each stage, by name, and the group that it is in.
    """
    caught: list[Caught] = []

    def hook(group: str) -> Callable[..., None]:
        def catch(module: nn.Module, arguments: Any, output: Any) -> None:
            found = tensors_in(output)
            caught.append(Caught(group, [tensor.clone() for tensor in found], [_edge(tensor) for tensor in found]))

        return catch

    modules = {network.get_submodule(place): group for place, group in places.items()}  # one may have several names
    handles = [module.register_forward_hook(hook(group)) for module, group in modules.items()]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()


def num_positional_arguments(network: nn.Module) -> int | None:
    """How many arguments the forward takes by position; None for any number.

    What a batch holds beyond them, such as the ground truth, is for the loss alone.
    """
    kinds = [parameter.kind for parameter in inspect.signature(network.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    return sum(kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD) for kind in kinds)


def _edge(tensor: Tensor) -> Edge | None:
    if not tensor.requires_grad:
        return None
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _ancestors(edges: Collection[Edge | None]) -> set[Edge]:
    """All edges of autograd's graph from which ``edges`` are computed, and these themselves."""
    seen: set[Edge] = set()
    pending = [edge for edge in edges if edge is not None]
    while pending:
        edge = pending.pop()
        if edge not in seen:
            seen.add(edge)
            pending += [following for following in edge[0].next_functions if following[0] is not None]
    return seen

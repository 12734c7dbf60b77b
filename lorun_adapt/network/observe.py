"""Capture the outputs of a network and of its stages, and select those that matter for distillation.

Outputs are captured at the modules of the stages, so the compared networks must have the same structure: the original
and its conversion. A stage may also return tensors that no later stage reads, such as symmetry residuals or logs.
These are left out: they say nothing about the images, and where they are nearly zero, their relative error would
dominate the loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from ..errors import LoRunError
from ..stages.stage_map import StageMap
from ..util.copying import copy_network
from ..util.modules import hint_on_arguments, positional_arguments, unwrapped
from ..util.nested import device_of, map_tensors, tensors_in, to_device
from ..util.numbers import is_numeric
from ..util.seeds import seeded

Edge = tuple[Any, int]  # a tensor in autograd's graph: (node, index of the node's output)


class Outputs(NamedTuple):
    """The outputs of one forward.

    Attributes:
        whole: the network's output, unchanged.
        final: the tensors in it that depend on the last stage.
        stages: the tensors that each stage passes on to later ones.
    """

    whole: Any
    final: list[Tensor]
    stages: list[Tensor]


class StageOutput(NamedTuple):
    """The output of one call of a stage; copies, since the network may change its tensors in place afterwards."""

    group: str
    tensors: list[Tensor]
    edges: list[Edge | None]


class Observer:
    """Runs networks with the structure of ``teacher``, and selects the outputs that matter.

    Args:
        teacher: the original network.
        stage_map: the positions of the stages.
        batch: arguments of the forward; one forward on them shows which outputs matter.

    Attributes:
        passed_on: for each call of a stage in a forward, the indices of the output's tensors that later stages read.

    Raises:
        LoRunError: a batch that the network cannot run on, or an output without floating-point tensors.
    """

    def __init__(self, teacher: nn.Module, stage_map: StageMap, batch: tuple[Any, ...]) -> None:
        self._groups = {site.module: group.name for site, group in stage_map.sites.items()}
        self._names = _positional_names(teacher)
        self._inputs_with_grad = False
        self._final, self.passed_on = self._relevant(teacher, batch)

    def run(self, network: nn.Module, batch: tuple[Any, ...], seed: int) -> Outputs:
        """Return the outputs of ``network`` for a copy of ``batch``; ``seed`` seeds its random numbers."""
        captured, output = self._forward(network, batch, seed)
        if torch.is_grad_enabled() and not self._inputs_with_grad and _lost_gradients(network, output):
            self._inputs_with_grad = True
            captured, output = self._forward(network, batch, seed)
        final = tensors_in(output)
        stages = [call.tensors[i] for call, kept in zip(captured, self.passed_on) for i in kept]
        return Outputs(output, [final[i] for i in self._final], stages)

    def _forward(self, network: nn.Module, batch: tuple[Any, ...], seed: int) -> tuple[list[StageOutput], Any]:
        arguments = to_device(_arguments_in(batch, self._names), device_of(network))
        if self._inputs_with_grad and torch.is_grad_enabled():
            arguments = map_tensors(arguments, _with_grad)
        with capturing(network, self._groups) as captured, seeded(seed):
            return captured, network(*arguments)

    def _relevant(self, teacher: nn.Module, batch: tuple[Any, ...]) -> tuple[list[int], list[list[int]]]:
        """Return the indices of the tensors that matter, in the final output and in the output of each stage's call.

        For a stage, these are the tensors from which later stages compute their outputs; for the final output, those
        computed from the last of these.
        """
        traced = None
        # Only the shape of the graph is read, so the tensors for a backward pass are not kept. That fails where a
        # forward has a backward pass inside, such as the gradient of a learnt energy.
        with suppress(Exception), saved_tensors_hooks(lambda tensor: None, _no_backward):
            traced = self._traced(teacher, batch)
        try:
            captured, final = traced or self._traced(teacher, batch)
        except Exception as error:
            raise LoRunError(
                f"{type(teacher).__name__} cannot run on the first batch of calibration ({type(error).__name__}: "
                f"{error}): each batch must hold the arguments of its forward{hint_on_arguments(teacher, batch)}"
            ) from error
        if not final:
            raise LoRunError(
                f"{type(teacher).__name__} returns no floating-point tensors, so there is nothing to train on: have "
                "its forward return the restored images, in a tensor, list, tuple, dict or dataclass"
            )
        seen = [_ancestors(call.edges) for call in captured]  # in the order of execution
        passed_on: list[list[int]] = []
        latest: dict[str, list[int]] = {}
        for place, call in enumerate(captured):
            later = set().union(*seen[place + 1 :])
            read = [i for i, edge in enumerate(call.edges) if edge in later]
            # No stage reads the last stage, and the final output may contain its logs too, so the last stage is
            # assumed to pass on the same tensors as the stage before it.
            read = read or [i for i in latest.get(call.group, range(len(call.edges))) if i < len(call.edges)]
            passed_on.append(read)
            latest[call.group] = read
        last = {captured[-1].edges[i] for i in passed_on[-1]} if captured else set()
        relevant = [i for i, tensor in enumerate(final) if last & _ancestors([_edge(tensor)])]
        return relevant or list(range(len(final))), passed_on

    def _traced(self, teacher: nn.Module, batch: tuple[Any, ...]) -> tuple[list[StageOutput], list[Tensor]]:
        """Return the outputs of the stages and of the network in a forward that records autograd's graph."""
        probe = copy_network(teacher)  # a copy, since every parameter must have a gradient to be traced
        for parameter in probe.parameters():
            parameter.requires_grad_(is_numeric(parameter))
        with torch.enable_grad(), capturing(probe, self._groups) as captured, seeded(0):
            return captured, tensors_in(probe(*to_device(_arguments_in(batch, self._names), device_of(probe))))


@contextmanager
def capturing(network: nn.Module, places: Mapping[str, str]) -> Iterator[list[StageOutput]]:
    """Within the ``with`` block, collect the outputs of the stages, in the order of their calls.

    Args:
        network: the network that runs in the block.
        places: the name of each stage's module, and its group.
    """
    captured: list[StageOutput] = []

    def hook(group: str) -> Callable[..., None]:
        def capture(module: nn.Module, arguments: Any, output: Any) -> None:
            found = tensors_in(output)
            copies, edges = [tensor.clone() for tensor in found], [_edge(tensor) for tensor in found]
            captured.append(StageOutput(group, copies, edges))

        return capture

    modules = {network.get_submodule(place): group for place, group in places.items()}  # one hook if it has two names
    handles = [module.register_forward_hook(hook(group)) for module, group in modules.items()]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def forward_arguments(network: nn.Module, batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the arguments of the forward in a batch; further items, such as the ground truth, are for the loss.

    Networks of deepinv (0.5) take the measurements and the physics. The truth may follow, (y, physics, x), or come
    first as in its data sets, (x, y, physics).

    >>> forward_arguments(nn.Bilinear(2, 2, 1), ("first", "second", "truth"))
    ('first', 'second')
    """
    return _arguments_in(batch, _positional_names(network))


def _positional_names(network: nn.Module) -> list[str] | None:
    """The names of the positional arguments of the forward; None for ``*args``."""
    parameters = inspect.signature(unwrapped(network).forward).parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    return list(positional_arguments(network))


def _arguments_in(batch: tuple[Any, ...], names: list[str] | None) -> tuple[Any, ...]:
    """The items of a batch that a forward with these positional arguments takes."""
    if names is None:
        return batch
    if names[1:2] == ["physics"] and len(batch) > 2:
        measured = [isinstance(item, Tensor) for item in batch[:3]]
        if measured == [True, True, False]:
            return batch[1:3]
        if measured == [True, False, True]:
            return batch[:2]
    return batch[: len(names)]


def _no_backward(nothing: None) -> Tensor:
    raise RuntimeError("no tensors are saved for a backward pass")


def _lost_gradients(network: nn.Module, output: Any) -> bool:
    """Whether nothing in the output has a gradient though parameters train.

    Reentrant checkpoints behind a frozen head do that: they only look at whether their inputs need gradients.
    """
    outputs = any(tensor.requires_grad for tensor in tensors_in(output))
    return not outputs and any(parameter.requires_grad for parameter in network.parameters())


def _with_grad(tensor: Tensor) -> Tensor:
    """A copy that needs a gradient, and may be changed in place."""
    return tensor.detach().requires_grad_().clone() if is_numeric(tensor) else tensor


def _edge(tensor: Tensor) -> Edge | None:
    if not tensor.requires_grad:
        return None
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _ancestors(edges: Collection[Edge | None]) -> set[Edge]:
    """Return ``edges`` and all edges of autograd's graph from which they are computed."""
    seen: set[Edge] = set()
    pending = [edge for edge in edges if edge is not None]
    while pending:
        edge = pending.pop()
        if edge not in seen:
            seen.add(edge)
            pending += [following for following in edge[0].next_functions if following[0] is not None]
    return seen

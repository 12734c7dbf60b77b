"""Align the stages of a network where a forward proves that it still computes the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..network.outputs import outputs_of
from ..stages.stage_map import Group, StageMap
from ..stages.tensors import stage_parameters, stage_stacks
from ..terms.term import Term
from ..util.copying import copy_network
from ..util.energy import relative_error
from .align import align
from .plan import Plan

TOLERANCE = 0.1  # of the precision's square root: the relative difference of outputs that rounding may make


@torch.no_grad()
def aligned(
    dun: nn.Module, stage_map: StageMap, plans: Mapping[str, Plan], kind: type[Term], inputs: Sequence[object] | None
) -> nn.Module:
    """Return a copy of ``dun`` whose stages have their hidden channels in one order, if that lowers what is lost.

    A stage's code may show its channels to others: in an attribute, through a hook, or by a method beside its forward.
    Structure does not tell, so both networks run on ``inputs``; if their outputs differ, or there are no inputs, the
    result is ``dun`` itself.

    Args:
        dun: the network; it is not changed.
        stage_map: the positions of its stages.
        plans: how the tensors of each group will be fitted.
        kind: the class of the terms.
        inputs: the arguments of a forward.
    """
    moved = {group.name: _moved(dun, group, plans[group.name], kind) for group in stage_map.groups} if inputs else {}
    if not any(moved.values()):
        return dun
    network = copy_network(dun)
    for group in stage_map.groups:
        for spec in group.tensors:
            if spec.name in moved[group.name]:
                for tensor, value in zip(stage_parameters(network, group, spec), moved[group.name][spec.name]):
                    tensor.copy_(value)
    return network if _same_outputs(dun, network, inputs or ()) else dun


def _moved(dun: nn.Module, group: Group, planned: Plan, kind: type[Term]) -> dict[str, Tensor]:
    """The tensors of all stages whose channels move, stacked."""
    stacks = stage_stacks(dun, group)
    if all(bool((stack == stack[0]).all()) for stack in stacks.values()):
        return {}
    denoisers = [dun.get_submodule(site.module) for site in group.sites]
    with_base = {spec.name for spec in group.tensors if not spec.without_base}
    settings = {name: setting for name, setting in planned.settings.items() if name in with_base}
    after = align(group, denoisers, stacks, settings, kind, planned.kept)
    return {name: stack for name, stack in after.items() if stack is not stacks[name]}


def _same_outputs(one: nn.Module, other: nn.Module, inputs: Sequence[object]) -> bool:
    try:
        first, second = outputs_of(one, inputs), outputs_of(other, inputs)
    except Exception:  # the user's code may raise anything
        return False
    return len(first) == len(second) and all(
        a.shape == b.shape and bool(relative_error(b, a) <= TOLERANCE**2 * torch.finfo(a.dtype).eps)
        for a, b in zip(first, second)
    )

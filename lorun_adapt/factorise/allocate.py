"""Allocate a budget of parameters: choose the rank of each tensor, and which tensors get a shared base.

A base is worth its parameters where the stages have much in common. In many trained networks they have so little in
common that a few more ranks in every stage keep more; such a tensor gets no base.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from torch import nn

from ..errors import LoRunError
from ..stages.stage_map import Group, StageMap, TensorSpec
from ..stages.tensors import stage_parameters
from ..terms.factors import Energies, energies, weighted_energies
from ..util.numbers import is_number
from .ranks import adaptable, matrices_of
from .sensitivity import Sensitivity

SEARCHES = 8  # conversions to try for a speed; the budget found is within 1/256 of the parameters of the best one
DAMPING = 0.1  # of the sensitivities; the losses at the ranks of a budget are neither small nor large


@dataclass(frozen=True)
class Allocation:
    """The rank of each tensor by name, and the names of the tensors without a base."""

    ranks: dict[str, int]
    without_base: frozenset[str]


@dataclass
class _Option:
    """A tensor with a base, or without one: its costs in parameters, and the energy that it keeps.

    Attributes:
        base_cost: parameters of the base.
        rank_cost: parameters of one more rank in every stage.
        base_gain: energy that the base keeps.
        gains: energy that rank 1, 2, … adds, up to the highest rank whose pair is smaller than the tensor.
    """

    without_base: bool
    base_cost: int
    rank_cost: int
    base_gain: float
    gains: list[float]


def allocate(
    dun: nn.Module,
    stage_map: StageMap,
    budget: int | float,
    sensitivity: Mapping[tuple[str, str], Sensitivity] | None = None,
    base: bool | None = None,
) -> Allocation:
    """The ranks and bases that keep the most energy within a budget of parameters.

    The energy is that of the weights. With ``sensitivity`` it is the geometric mean of this and of the energy of the
    output: the latter by itself holds for small changes only, and leaves some tensors too little to train.

    Args:
        budget: parameters of the whole converted network, or a share (0..1) of the original's.
        sensitivity: by group and tensor, as from :func:`sensitivities`.
        base: whether every tensor gets a base; by default only those for which a base keeps more than the ranks it
            costs.

    Raises:
        LoRunError: the budget is no such number, or below the parameters that rank 1 takes.
    """
    before = sum(parameter.numel() for parameter in dun.parameters())
    if not is_number(budget) or not 0 < budget < float("inf") or (budget >= 1 and budget != int(budget)):
        raise LoRunError(
            f"expected a whole number of parameters, or a share between 0 and 1, found the budget {budget!r}: give "
            "90_000 or 0.3, for example"
        )
    limit = int(budget) if budget >= 1 else int(budget * before)
    options = _options(dun, stage_map, sensitivity)
    private = _num_private(dun, stage_map, set(options))
    left = limit - private
    least = private + sum(option.base_cost + option.rank_cost for option in _alike(options, bool(base)).values())
    if limit < least:
        hint = ", or give a share below 1: numbers of 1 and more are parameters" if 1 <= budget <= 100 else ""
        raise LoRunError(
            f"expected a budget of at least {least:,} parameters, which the network takes at rank 1, found {limit:,}: "
            f"raise it{hint}"
        )
    return _best(options, left, base)


def _alike(options: Mapping[str, list[_Option]], base: bool) -> dict[str, _Option]:
    """The options that give every tensor a base, or none."""
    return {name: next(option for option in found if option.without_base != base) for name, found in options.items()}


def _best(options: Mapping[str, list[_Option]], left: int, base: bool | None = None) -> Allocation:
    """The best allocation of ``left`` parameters; ``base`` as in :func:`allocate`."""
    starts = [_alike(options, kind) for kind in ((False, True) if base is None else (base,))]
    chosen = max(starts, key=lambda choice: _fill(choice, left)[0])
    kept, ranks = _fill(chosen, left)
    better = base is None
    while better:
        better = False
        for name, alternatives in options.items():
            other = {**chosen, name: next(option for option in alternatives if option is not chosen[name])}
            filled = _fill(other, left)
            if filled[0] > kept:
                chosen, (kept, ranks), better = other, filled, True
    return Allocation(ranks, frozenset(name for name, option in chosen.items() if option.without_base))


def allocate_for_speed(
    dun: nn.Module,
    stage_map: StageMap,
    faster: float,
    operations: Callable[[Allocation], float],
    sensitivity: Mapping[tuple[str, str], Sensitivity] | None = None,
) -> Allocation:
    """The ranks and bases of the largest budget whose network needs at most 1 / ``faster`` of the operations.

    A base saves no operations. A tensor without one is not multiplied out, so its ranks are what it costs to run.

    Args:
        faster: a number above 1.
        operations: returns the operations of the network with an allocation, as a share of the original's.
        sensitivity: as in :func:`allocate`.

    Raises:
        LoRunError: ``faster`` is no such number, or more than rank 1 in every tensor can give.
    """
    if not is_number(faster) or not 1 < faster < math.inf:
        raise LoRunError(f"expected a number above 1 for faster, found {faster!r}: give 2, for example")
    options = _options(dun, stage_map, sensitivity)
    low = sum(option.rank_cost for option in _alike(options, False).values())
    high = max(low, sum(p.numel() for p in dun.parameters()) - _num_private(dun, stage_map, set(options)))
    found = _best(options, low)
    if (share := operations(found)) > 1 / faster:
        raise LoRunError(
            f"the network cannot need {faster:g} times fewer operations, as it takes {share:.2f} of the original's at "
            "rank 1: ask for less, or give a budget"
        )
    for _ in range(SEARCHES):
        middle = (low + high) // 2
        candidate = _best(options, middle)
        if operations(candidate) <= 1 / faster:
            low, found = middle, candidate
        else:
            high = middle
    return found


def _fill(options: Mapping[str, _Option], left: int) -> tuple[float, dict[str, int]]:
    """The energy that these options keep with ``left`` parameters, and their ranks.

    Greedy: the next rank goes to the tensor that gains the most energy per parameter.
    """
    left -= sum(option.base_cost + option.rank_cost for option in options.values())
    if left < 0:
        return -math.inf, {}
    ranks = dict.fromkeys(options, 1)
    kept = sum(option.base_gain + option.gains[0] for option in options.values())
    queue = [(-option.gains[1] / option.rank_cost, name) for name, option in options.items() if len(option.gains) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        option, rank = options[name], ranks[name]
        if option.rank_cost > left:
            continue
        left, kept, ranks[name] = left - option.rank_cost, kept + option.gains[rank], rank + 1
        if rank + 1 < len(option.gains):
            heapq.heappush(queue, (-option.gains[rank + 1] / option.rank_cost, name))
    return kept, ranks


def _num_private(dun: nn.Module, stage_map: StageMap, adapted: Collection[str]) -> int:
    """Parameters of the converted network, apart from the bases and factors of the tensors in ``adapted``."""
    size = sum(parameter.numel() for parameter in dun.parameters())
    for group in stage_map.groups:
        for spec in group.tensors:
            if not spec.common and not spec.buffer:
                distinct = {id(tensor) for tensor in stage_parameters(dun, group, spec)}
                size -= len(distinct) * spec.numel
                size += 0 if spec.smaller(1) and spec.name in adapted else (1 + len(group.sites)) * spec.numel
    return size


def _options(
    dun: nn.Module, stage_map: StageMap, sensitivity: Mapping[tuple[str, str], Sensitivity] | None
) -> dict[str, list[_Option]]:
    """For each tensor, the option with a base and the option without one."""
    places: dict[str, list[tuple[Group, TensorSpec]]] = {}
    for group, spec in adaptable(stage_map):
        places.setdefault(spec.name, []).append((group, spec))
    every = [place for found in places.values() for place in found]
    if not all((g.name, s.name) in (sensitivity or {}) or _is_constant(dun, g, s) for g, s in every):
        sensitivity = None  # tensors with and without a sensitivity can't be compared
    options: dict[str, list[_Option]] = {}
    for name, found in places.items():
        highest = min(sum(spec.smaller(rank) for rank in range(1, min(spec.matrix) + 1)) for _, spec in found)
        kept = [_kept(dun, g, s, (sensitivity or {}).get((g.name, s.name))) for g, s in found]
        for without_base in (False, True):
            option = _Option(
                without_base,
                base_cost=0 if without_base else sum(spec.numel for _, spec in found),
                rank_cost=sum(len(group.sites) * sum(spec.matrix) for group, spec in found),
                base_gain=0.0 if without_base else sum(item.base for item in kept),
                gains=[
                    sum(float((item.without_base if without_base else item.ranks)[rank]) for item in kept)
                    for rank in range(highest)
                ],
            )
            options.setdefault(name, []).append(option)
    return options


def _kept(dun: nn.Module, group: Group, spec: TensorSpec, sensitivity: Sensitivity | None) -> Energies:
    """The energy that the base and the ranks of a tensor keep."""
    matrices = matrices_of(dun, group, spec)
    of_weights = energies(matrices)
    if sensitivity is None:
        return of_weights
    of_output = weighted_energies(matrices, sensitivity.rows, sensitivity.columns, DAMPING)
    return Energies(
        (of_weights.base * of_output.base) ** 0.5,
        (of_weights.ranks * of_output.ranks).sqrt(),
        (of_weights.without_base * of_output.without_base).sqrt(),
    )


def _is_constant(dun: nn.Module, group: Group, spec: TensorSpec) -> bool:
    """Whether a tensor is the same in all stages, so that its residuals have no energy."""
    matrices = matrices_of(dun, group, spec)
    return bool((matrices == matrices[0]).all())

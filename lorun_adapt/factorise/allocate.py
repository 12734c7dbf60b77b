"""Where a budget of parameters is best allocation: the rank of each tensor, and which tensors are worth a base.

A base is worth its parameters where the stages have much in common. In many trained networks they have so
little that a few more ranks in every stage keep more, and then the tensor goes without.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import nn

from ..errors import LoRunError
from ..stages.stage_map import Group, StageMap, TensorSpec
from ..stages.tensors import stage_parameters
from ..terms.factors import Energies, energies, weighted_energies
from ..util.numbers import is_number
from .ranks import adaptable, matrices_of
from .sensitivity import Sensitivity

DAMPING = 0.1  # of the sensitivities: what is lost at the ranks of a budget is neither small nor large


@dataclass(frozen=True)
class Allocation:
    """A rank for each tensor by name, and the names of those without a base."""

    ranks: dict[str, int]
    without_base: frozenset[str]


@dataclass
class _Option:
    """A tensor with a base, or without: what each costs in parameters, and keeps of the stages."""

    without_base: bool
    base_cost: int
    rank_cost: int
    base_gain: float
    gains: list[float]  # of rank 1, 2, …, as far as a pair is smaller than the tensor


def allocate(
    dun: nn.Module,
    stage_map: StageMap,
    budget: int | float,
    sensitivity: Mapping[tuple[str, str], Sensitivity] | None = None,
) -> Allocation:
    """What keeps most of the stages at ``budget`` parameters of the whole network, or that share (0..1) of them.

    Kept is energy of the weights or, where it is known how sensitive the output is to them, the geometric mean of
    that and of the energy of the output: the latter alone holds for small changes only, and leaves the other
    tensors too little to train.

    Raises:
        LoRunError: no such number, or fewer parameters than rank 1 takes.
    """
    before = sum(parameter.numel() for parameter in dun.parameters())
    if not is_number(budget) or not 0 < budget < float("inf") or (budget >= 1 and budget != int(budget)):
        raise LoRunError(
            f"expected a budget in parameters, or a share of them between 0 and 1, found {budget!r}: choose one"
        )
    limit = int(budget) if budget >= 1 else int(budget * before)
    options = _options(dun, stage_map, sensitivity)
    rest = _without(dun, stage_map, set(options))
    left = limit - rest
    alone = {name: option for name, (_, option) in options.items()}  # the cheapest
    least = rest + sum(option.base_cost + option.rank_cost for option in alone.values())
    if limit < least:
        raise LoRunError(
            f"expected a budget of at least {least:,} parameters, which the network takes at rank 1, found {limit:,}: "
            "raise it"
        )
    chosen = max(
        (alone, {name: option for name, (option, _) in options.items()}), key=lambda found: _fill(found, left)[0]
    )
    kept, ranks = _fill(chosen, left)
    better = True
    while better:
        better = False
        for name, of_tensor in options.items():
            other = {**chosen, name: next(option for option in of_tensor if option is not chosen[name])}
            found = _fill(other, left)
            if found[0] > kept:
                chosen, (kept, ranks), better = other, found, True
    return Allocation(ranks, frozenset(name for name, option in chosen.items() if option.without_base))


def _fill(options: Mapping[str, _Option], left: int) -> tuple[float, dict[str, int]]:
    """What these options keep with ``left`` parameters, and each rank: greedily, by what a rank keeps per parameter."""
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


def _without(dun: nn.Module, stage_map: StageMap, adapted: Collection[str]) -> int:
    """Parameters of the network, converted, without those that stand for the tensors of these names."""
    size = sum(parameter.numel() for parameter in dun.parameters())
    for group in stage_map.groups:
        for spec in group.tensors:
            if not spec.common and not spec.buffer:
                held = {id(tensor) for tensor in stage_parameters(dun, group, spec)}
                size -= len(held) * spec.numel
                size += 0 if spec.smaller(1) and spec.name in adapted else (1 + len(group.sites)) * spec.numel
    return size


def _options(
    dun: nn.Module, stage_map: StageMap, sensitivity: Mapping[tuple[str, str], Sensitivity] | None
) -> dict[str, list[_Option]]:
    places: dict[str, list[tuple[Group, TensorSpec]]] = {}
    for group, spec in adaptable(stage_map):
        places.setdefault(spec.name, []).append((group, spec))
    every = [place for found in places.values() for place in found]
    if not all((g.name, s.name) in (sensitivity or {}) or _alike(dun, g, s) for g, s in every):
        sensitivity = None  # what is known of some tensors alone can't be compared
    options: dict[str, list[_Option]] = {}
    for name, found in places.items():
        highest = min(sum(spec.smaller(rank) for rank in range(1, min(spec.matrix) + 1)) for _, spec in found)
        kept = [_kept(dun, g, s, (sensitivity or {}).get((g.name, s.name))) for g, s in found]
        for alone in (False, True):
            option = _Option(
                alone,
                base_cost=0 if alone else sum(spec.numel for _, spec in found),
                rank_cost=sum(len(group.sites) * sum(spec.matrix) for group, spec in found),
                base_gain=0.0 if alone else sum(item.base for item in kept),
                gains=[
                    sum(float((k.without_base if alone else k.ranks)[rank]) for k in kept) for rank in range(highest)
                ],
            )
            options.setdefault(name, []).append(option)
    return options


def _kept(dun: nn.Module, group: Group, spec: TensorSpec, known: Sensitivity | None) -> Energies:
    """What the base of a tensor keeps, and its ranks."""
    matrices = matrices_of(dun, group, spec).cpu()
    plain = energies(matrices)
    if known is None:
        return plain
    seen = weighted_energies(matrices, known.rows, known.columns, DAMPING)
    return Energies(
        (plain.base * seen.base) ** 0.5,
        (plain.ranks * seen.ranks).sqrt(),
        (plain.without_base * seen.without_base).sqrt(),
    )


def _alike(dun: nn.Module, group: Group, spec: TensorSpec) -> bool:
    """Whether a tensor is the same in all stages, so that no rank has anything to keep."""
    matrices = matrices_of(dun, group, spec)
    return bool((matrices == matrices[0]).all())

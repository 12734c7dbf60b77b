"""From a rank, a share of energy or a budget of parameters to PEFT's ``LoraConfig``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from peft import LoraConfig
from torch import nn

from .assemble import stage_parameters, stage_values
from .errors import LoRunError
from .factorise import energy_by_rank, rank_for_energy, weighted_energy_by_rank
from .lowrank import pair_size
from .sensitivity import Sensitivity
from .stages import Group, StageMap, TensorSpec

DAMPING = 0.1  # of the sensitivities: what is lost at the ranks of a budget is neither small nor large


def config_for_rank(dun: nn.Module, stage_map: StageMap, rank: int | float) -> LoraConfig:
    """One rank for all adapters, or, in 0..1, the share of the residuals' energy that each tensor is to keep.

    Raises:
        LoRunError: neither of them.
    """
    if not _is_number(rank) or not 0 < rank < float("inf") or (rank >= 1 and rank != int(rank)):
        raise LoRunError(
            f"expected a rank of 1 or more, or a share of energy between 0 and 1, found {rank!r}: choose one"
        )
    if rank >= 1:
        return LoraConfig(r=int(rank), lora_alpha=int(rank))
    ranks: dict[str, int] = {}
    for group, spec in _adaptable(stage_map):
        ranks[spec.name] = max(rank_for_energy(_matrices(dun, group, spec), rank), ranks.get(spec.name, 1))
    return config_of_ranks(ranks)


def config_for_budget(
    dun: nn.Module,
    stage_map: StageMap,
    budget: int | float,
    sensitivity: Mapping[tuple[str, str], Sensitivity] | None = None,
) -> LoraConfig:
    """The ranks with which the whole network keeps most at ``budget`` parameters, or that share (0..1) of them.

    From rank 1 in every tensor that a pair can be smaller than, the next rank goes where it keeps the
    most of the stages' residuals for its parameters: energy of the weights or, where it is known how sensitive
    the output is to them, the geometric mean of that and of the energy of the output.

    Raises:
        LoRunError: no such number, or fewer parameters than rank 1 takes.
    """
    before = sum(parameter.numel() for parameter in dun.parameters())
    if not _is_number(budget) or not 0 < budget < float("inf") or (budget >= 1 and budget != int(budget)):
        raise LoRunError(
            f"expected a budget in parameters, or a share of them between 0 and 1, found {budget!r}: choose one"
        )
    limit = int(budget) if budget >= 1 else int(budget * before)
    places: dict[str, list[tuple[Group, TensorSpec]]] = {}
    for group, spec in _adaptable(stage_map):
        places.setdefault(spec.name, []).append((group, spec))
    ranks = dict.fromkeys(places, 1)
    left = limit - _size(dun, before, stage_map, ranks)
    if left < 0:
        raise LoRunError(
            f"expected a budget of at least {limit - left:,} parameters, which the network takes at rank 1, found "
            f"{limit:,}: raise it"
        )
    costs = {name: sum(len(group.sites) * sum(spec.matrix) for group, spec in found) for name, found in places.items()}
    if not all(
        (group.name, spec.name) in (sensitivity or {}) or _alike(dun, group, spec)
        for group, spec in _adaptable(stage_map)
    ):
        sensitivity = None  # what is known of some tensors alone can't be compared
    gains = {name: [_gains(dun, group, spec, sensitivity) for group, spec in found] for name, found in places.items()}

    def worth(name: str) -> float:
        """What the next rank of a tensor keeps for each parameter."""
        rank = ranks[name]
        return sum(float(gain[rank]) for gain in gains[name] if rank < len(gain)) / costs[name]

    while affordable := [
        name for name in ranks if costs[name] <= left and all(s.smaller(ranks[name] + 1) for _, s in places[name])
    ]:
        name = max(affordable, key=worth)
        left -= costs[name]
        ranks[name] += 1
    return config_of_ranks(ranks)


def _gains(
    dun: nn.Module, group: Group, spec: TensorSpec, sensitivity: Mapping[tuple[str, str], Sensitivity] | None
) -> torch.Tensor:
    """What rank 1, 2, … of a tensor adds to what is kept of its residuals.

    The energy of the output alone holds for small changes only, and leaves the other tensors too little to train.
    """
    matrices = _matrices(dun, group, spec).cpu()
    gains = _steps(energy_by_rank(matrices))
    known = (sensitivity or {}).get((group.name, spec.name))
    if known is not None:
        gains = (gains * _steps(weighted_energy_by_rank(matrices, known.rows, known.columns, DAMPING))).sqrt()
    return gains


def _alike(dun: nn.Module, group: Group, spec: TensorSpec) -> bool:
    """Whether a tensor is the same in all stages, so that no rank has anything to keep."""
    matrices = _matrices(dun, group, spec)
    return bool((matrices == matrices[0]).all())


def _steps(cumulated: torch.Tensor) -> torch.Tensor:
    return cumulated.diff(prepend=cumulated.new_zeros(1)).clamp_min(0)


def config_of_ranks(ranks: Mapping[str, int]) -> LoraConfig:
    """A config with the rank of each tensor by name, and a scaling of 1."""
    pattern = {"^" + re.escape(name): found for name, found in ranks.items()}
    pattern.update({"^" + re.escape(name.removesuffix(".weight")): found for name, found in ranks.items()})
    return LoraConfig(rank_pattern=pattern, alpha_pattern=dict(pattern))


def _adaptable(stage_map: StageMap) -> Iterable[tuple[Group, TensorSpec]]:
    return [(group, spec) for group in stage_map.groups for spec in group.tensors if spec.smaller(1)]


def _matrices(dun: nn.Module, group: Group, spec: TensorSpec) -> torch.Tensor:
    return torch.stack(stage_values(dun, group, spec)).reshape(len(group.sites), *spec.matrix)


def _size(dun: nn.Module, before: int, stage_map: StageMap, ranks: Mapping[str, int]) -> int:
    """Parameters of the whole network with these ranks."""
    size = before
    for group in stage_map.groups:
        for spec in group.tensors:
            if spec.common or spec.buffer:
                continue
            rank = ranks.get(spec.name)
            own = pair_size(spec.matrix, rank) if rank and spec.smaller(rank) else spec.numel
            held = {id(tensor) for tensor in stage_parameters(dun, group, spec)}
            size += spec.numel + len(group.sites) * own - len(held) * spec.numel
    return size


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)

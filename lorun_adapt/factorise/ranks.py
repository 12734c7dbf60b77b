"""From a rank, or a share of energy, to PEFT's ``LoraConfig``."""

from __future__ import annotations

import torch
from peft import LoraConfig
from torch import nn

from ..errors import LoRunError
from ..peft_format.options import config_of_ranks
from ..stages.stage_map import Group, StageMap, TensorSpec
from ..stages.tensors import stage_values
from ..terms.factors import rank_for_energy
from ..util.numbers import is_index, is_number


def config_for_rank(rank: int) -> LoraConfig:
    """One rank for all adapters, and a scaling of 1.

    Raises:
        LoRunError: no whole number of 1 or more.

    >>> from lorun_adapt.factorise.ranks import config_for_rank
    >>> config_for_rank(4).r
    4
    """
    if not is_index(rank) or rank < 1:
        hint = "pass a share of energy as energy=" if is_number(rank) and 0 < rank < 1 else "give 8, for example"
        raise LoRunError(f"expected a rank that is a whole number of 1 or more, found {rank!r}: {hint}")
    return LoraConfig(r=int(rank), lora_alpha=int(rank))


def config_for_energy(dun: nn.Module, stage_map: StageMap, energy: float) -> LoraConfig:
    """For each tensor the lowest rank that keeps a share of the energy of the residuals from the stages' mean.

    Args:
        energy: the share, between 0 and 1.

    Raises:
        LoRunError: no such number.
    """
    if not is_number(energy) or not 0 < energy < 1:
        raise LoRunError(
            f"expected a share of energy between 0 and 1, found {energy!r}: give a number of ranks as rank"
        )
    ranks: dict[str, int] = {}
    for group, spec in adaptable(stage_map):
        ranks[spec.name] = max(rank_for_energy(matrices_of(dun, group, spec), energy), ranks.get(spec.name, 1))
    return config_of_ranks(ranks)


def adaptable(stage_map: StageMap) -> list[tuple[Group, TensorSpec]]:
    """The tensors that a low-rank pair can be smaller than, with their groups."""
    return [(group, spec) for group in stage_map.groups for spec in group.tensors if spec.smaller(1)]


def matrices_of(dun: nn.Module, group: Group, spec: TensorSpec) -> torch.Tensor:
    """A tensor of all stages, folded to matrices, on the CPU: (N, m, n)."""
    return torch.stack(stage_values(dun, group, spec)).reshape(len(group.sites), *spec.matrix).cpu()

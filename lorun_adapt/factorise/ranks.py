"""Make PEFT's ``LoraConfig`` of a rank, or of a share of the energy to keep."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft import LoraConfig
from torch import nn

from ..errors import LoRunError
from ..peft_format.options import config_of_ranks
from ..stages.stage_map import Group, StageMap, TensorSpec
from ..stages.tensors import stage_values
from ..terms.factors import rank_for_energy
from ..util.numbers import is_number


def config_for_rank(dun: nn.Module, stage_map: StageMap, rank: int | float) -> LoraConfig:
    """The config for one rank of all adapters, or for the share (0..1) of its residuals' energy that each tensor keeps.

    Raises:
        LoRunError: the number is neither a rank nor a share.
    """
    if not is_number(rank) or not 0 < rank < float("inf") or (rank >= 1 and rank != int(rank)):
        raise LoRunError(
            f"expected a rank of 1 or more, or a share of energy between 0 and 1, found {rank!r}: choose one"
        )
    if rank >= 1:
        return LoraConfig(r=int(rank), lora_alpha=int(rank))
    ranks: dict[str, int] = {}
    for group, spec in adaptable(stage_map):
        ranks[spec.name] = max(rank_for_energy(matrices_of(dun, group, spec), rank), ranks.get(spec.name, 1))
    return config_of_ranks(ranks)


def adaptable(stage_map: StageMap) -> Iterable[tuple[Group, TensorSpec]]:
    """The tensors that are larger than a pair of rank 1."""
    return [(group, spec) for group in stage_map.groups for spec in group.tensors if spec.smaller(1)]


def matrices_of(dun: nn.Module, group: Group, spec: TensorSpec) -> torch.Tensor:
    """A tensor of all stages, folded to matrices: (N, m, n)."""
    return torch.stack(stage_values(dun, group, spec)).reshape(len(group.sites), *spec.matrix)

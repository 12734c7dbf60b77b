"""Combine adapter sets: a new set that is the weighted sum of what each adds to the base."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import LoRunError
from ..network.adapter import StageAdapter, make_adapter, terms_of
from ..network.converted import AdapterInfo, AdapterSet
from ..network.dense import dense_tensors, weighted_sum_of_tensors
from ..network.noise import mixed
from ..peft_format.options import config_of_ranks
from ..stages.stage_map import Group, StageMap
from ..stages.tensors import outside_parameters
from ..terms.term import Term
from ..util.modules import has_valid_values, tensor_of
from ..util.numbers import is_number
from ..util.torch_modes import in_own_modes


@in_own_modes
def weighted_set(
    base: nn.Module, stage_map: StageMap, sets: Sequence[AdapterSet], weights: Sequence[float]
) -> AdapterSet:
    """Return the weighted sum of ``sets``, with the stages that all of them have.

    Args:
        base: the shared base.
        stage_map: the positions of its stages.
        sets: the sets to sum.
        weights: a finite number for each set.

    Raises:
        LoRunError: weights that are not finite numbers; no stage in common; a sum with NaN or Inf.
    """
    weights = [weight.item() if isinstance(weight, np.generic) else weight for weight in weights]
    for weight in weights:
        if not is_number(weight) or not math.isfinite(weight):
            raise LoRunError(f"expected finite numbers as weights, found {weight!r}: give one number for each set")
    adapters: dict[int, dict[str, StageAdapter]] = {}
    for group in stage_map.groups:
        for site in group.sites:
            if all(site.stage in held.adapters for held in sets):
                parts = [held.adapters[site.stage][group.name] for held in sets]
                denoiser = base.get_submodule(site.module)
                adapters.setdefault(site.stage, {})[group.name] = _weighted(denoiser, group, parts, weights)
    if not adapters:
        raise LoRunError("the sets have no stage in common: load complete sets")
    ranks: dict[str, int] = {}
    for adapter in [adapter for stage in adapters.values() for adapter in stage.values()]:
        for name, term in terms_of(adapter).items():
            ranks[name] = max(term.rank, ranks.get(name, 1))
    noise = mixed([held.info.noise for held in sets], weights)
    outside = weighted_outside(base, stage_map, [held.outside for held in sets], weights)
    return AdapterSet(adapters, config_of_ranks(ranks), outside, AdapterInfo().with_noise(noise))


@in_own_modes
@torch.no_grad()
def weighted_outside(
    base: nn.Module, stage_map: StageMap, outsides: Sequence[Mapping[str, Tensor]], weights: Sequence[float]
) -> dict[str, Tensor]:
    """Return the weighted sum of the sets' parameters outside the stages; a set without one counts with the base's."""
    of_base = outside_parameters(base, stage_map)
    sums = {}
    for name in dict.fromkeys(name for outside in outsides for name in outside):
        values = [outside.get(name, of_base[name]).detach() for outside in outsides]
        sums[name] = weighted_sum_of_tensors(of_base[name].detach(), values, weights, name)
        _check_values(sums[name], False, name, weights)
    return sums


def check_values(name: str, held: AdapterSet) -> None:
    """Check that a set can be combined with others.

    Raises:
        LoRunError: a tensor of the set has NaN or Inf.
    """
    adapters = [adapter for stage in held.adapters.values() for adapter in stage.values()]
    if not all(has_valid_values(p.detach(), False) for adapter in adapters for p in adapter.parameters()):
        raise LoRunError(
            f"the set {name!r} has NaN or Inf in its tensors, as after training that diverged: load it again"
        )


def _check_values(value: Tensor, buffer: bool, name: str, weights: Sequence[float]) -> None:
    if not has_valid_values(value, buffer):
        raise LoRunError(f"the weights {list(weights)} give NaN or Inf in {name!r}: choose smaller weights")


@torch.no_grad()
def _weighted(
    denoiser: nn.Module, group: Group, adapters: Sequence[StageAdapter], weights: Sequence[float]
) -> StageAdapter:
    terms = [terms_of(adapter) for adapter in adapters]
    dense = [dense_tensors(denoiser, group, adapter) for adapter in adapters]
    sums: dict[str, Term] = {}
    private: dict[str, Tensor] = {}
    for spec in group.tensors:
        if spec.common:
            continue
        parts = [own[spec.name] for own in terms if spec.name in own]
        if len(parts) == len(adapters) and len({type(part) for part in parts}) == 1:
            sums[spec.name] = type(parts[0]).weighted_sum(parts, weights)
            for parameter in sums[spec.name].parameters():
                _check_values(parameter, False, spec.name, weights)
        else:
            values = [own[spec.name] for own in dense]
            private[spec.name] = weighted_sum_of_tensors(tensor_of(denoiser, spec.name), values, weights, spec.name)
            _check_values(private[spec.name], spec.buffer, spec.name, weights)
    return make_adapter(group, sums, private)

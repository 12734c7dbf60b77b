"""A new set from others: the weighted sum of what each adds to the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import LoRunError
from ..network.adapter import StageAdapter, lowrank_terms
from ..network.assemble import dense_tensors
from ..network.converted import AdapterInfo, AdapterSet
from ..network.noise import mixed
from ..peft_format.options import config_of_ranks
from ..stages.stage_map import Group, stage_key
from ..stages.tensors import outside_parameters
from ..terms.lowrank import LowRank
from ..util.modules import has_valid_values, tensor_of

if TYPE_CHECKING:
    from .adapter_sets import AdapterSets


def weighted_set(lorun: AdapterSets, names: Sequence[str], weights: Sequence[float]) -> AdapterSet:
    """Of the stages that all of these sets hold; see :meth:`AdapterSets.add_weighted_adapter`."""
    if isinstance(names, str) or len(names) == 0 or len(names) != len(weights):
        raise LoRunError(
            f"expected as many weights as adapters, found {weights!r} for {names!r}: give two lists of one length"
        )
    for name in names:
        if name not in lorun.adapters:
            raise LoRunError(f"expected an adapter among {lorun.adapter_names}, found {name!r}: load it first")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise LoRunError(
                f"expected finite numbers for weights, found {weight!r}: give how much of each set to take"
            )
    found = {}
    for group in lorun.stage_map.groups:
        for site in group.sites:
            if all(stage_key(site.stage) in lorun.adapters[name] for name in names):
                own = [lorun.adapter_of(group, site, name) for name in names]
                found[group.name, site] = _weighted(lorun.base.get_submodule(site.module), group, own, weights)
    if not found:
        raise LoRunError(f"expected adapters with a stage in common, found none in {list(names)}: load whole sets")
    ranks: dict[str, int] = {}
    for adapter in found.values():
        for name, term in lowrank_terms(adapter).items():
            ranks[name] = max(term.rank, ranks.get(name, 1))
    noise = mixed([lorun.adapter_info[name].noise_schedule for name in names], weights)
    return AdapterSet(found, config_of_ranks(ranks), _outside(lorun, names, weights), AdapterInfo(noise))


@torch.no_grad()
def _outside(lorun: AdapterSets, names: Sequence[str], weights: Sequence[float]) -> dict[str, Tensor]:
    """Where a set has no parameters outside the stages, they are the base's."""
    own = [lorun.outside_of(name) for name in names]
    base = outside_parameters(lorun.base, lorun.stage_map)
    found = {}
    for name in dict.fromkeys(name for tensors in own for name in tensors):
        values = [tensors.get(name, base[name]).detach() for tensors in own]
        found[name] = _sum_of_tensors(base[name].detach(), values, weights, name)
        _check_values(found[name], False, name, weights)
    return found


def _check_values(value: Tensor, buffer: bool, name: str, weights: Sequence[float]) -> None:
    if not has_valid_values(value, buffer):
        raise LoRunError(
            f"expected finite sums, found NaN or Inf in {name!r} for the weights {list(weights)}: choose smaller ones"
        )


@torch.no_grad()
def _weighted(
    denoiser: nn.Module, group: Group, adapters: Sequence[StageAdapter], weights: Sequence[float]
) -> StageAdapter:
    terms = [lowrank_terms(adapter) for adapter in adapters]
    dense = [dense_tensors(denoiser, group, adapter) for adapter in adapters]
    lowrank: dict[str, LowRank] = {}
    private: dict[str, Tensor] = {}
    for spec in group.tensors:
        if spec.common:
            continue
        if all(spec.name in own for own in terms):
            lowrank[spec.name] = _sum_of_terms([own[spec.name] for own in terms], weights)
            for factor in lowrank[spec.name].parameters():
                _check_values(factor, False, spec.name, weights)
        else:
            base = tensor_of(denoiser, spec.name)
            value = _sum_of_tensors(base, [own[spec.name] for own in dense], weights, spec.name)
            trains = not spec.buffer and (value.is_floating_point() or value.is_complex())
            private[spec.name] = value if spec.buffer else nn.Parameter(value, requires_grad=trains)
            _check_values(value, spec.buffer, spec.name, weights)
    return StageAdapter(lowrank, private, [spec.name for spec in group.tensors if spec.frozen])


def _sum_of_terms(terms: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The weighted sum of the terms' products, at the largest of their ranks."""
    like = terms[0].lora_B
    exact = torch.complex128 if like.is_complex() else torch.float64
    # On the CPU: the matrices are small, and not every accelerator has float64.
    left = torch.cat([w * t.scaling * t.lora_B.detach().cpu().to(exact) for w, t in zip(weights, terms)], dim=1)
    right = torch.cat([t.lora_A.detach().cpu().to(exact) for t in terms], dim=0)
    rank = min(max(term.rank for term in terms), *left.shape[:1], *right.shape[1:])
    q, r = torch.linalg.qr(left)
    p, s = torch.linalg.qr(right.mH)
    u, values, v = torch.linalg.svd(r @ s.mH, full_matrices=False)
    root = values[:rank].sqrt()
    b, a = (q @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ p.mH)
    return LowRank(a.to(like), b.to(like))


def _sum_of_tensors(base: Tensor, values: Sequence[Tensor], weights: Sequence[float], name: str) -> Tensor:
    """The base, and the weighted differences from it."""
    counted = not (base.is_floating_point() or base.is_complex())
    alike = all(torch.equal(value, values[0]) for value in values)
    if alike and (counted or math.isclose(sum(weights), 1.0)):
        return values[0].clone()
    if counted:
        raise LoRunError(
            f"expected whole numbers that are the same in all adapters, found different ones in {name!r}: these can't "
            "be weighted"
        )
    exact = torch.promote_types(base.dtype, torch.float32)
    sum_ = base.detach().to(exact).clone()
    for weight, value in zip(weights, values):
        sum_ += weight * (value.to(exact) - base.detach().to(exact))
    return sum_.to(base.dtype)

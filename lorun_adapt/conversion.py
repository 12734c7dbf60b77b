"""Convert a trained unfolding network: find its stages, choose ranks, factorise, put together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence

import torch
from peft import LoraConfig
from torch import Tensor, nn

from .align import align
from .assemble import StageAdapter, copy_network, share, stage_values
from .errors import LoRunError
from .factorise import factorise, rank_for_energy
from .find import find_stages
from .lowrank import DEFAULT_RANK, LowRank, untrained
from .model import DEFAULT_SET, LoRunModel
from .plain import check_dense, check_plain, check_reachable, check_sound
from .plan import Plan, plan
from .stages import Group, StageMap


def convert(
    dun: nn.Module,
    config: LoraConfig | None = None,
    *,
    rank: int | float | None = None,
    stages: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    example_inputs: Sequence[object] | None = None,
    calls: Mapping[str, int] | None = None,
) -> LoRunModel:
    """Collapse the repeated denoisers of ``dun`` into one base and a low-rank adapter per stage.

    The network itself is left untouched. Without data the quality falls, as the stages of a
    trained network have little in common; a module called in a loop is shared already, and its
    adapters start at zero.

    Args:
        dun: the trained network.
        config: a PEFT ``LoraConfig``, with names relative to the denoiser. Read are ``r``,
            ``lora_alpha``, ``use_rslora``, ``rank_pattern``, ``alpha_pattern``,
            ``target_modules``, ``exclude_modules``, ``target_parameters`` and
            ``modules_to_save`` (private by request).
        rank: instead of ``config``: the rank of all adapters (default 8), or, in 0..1, the part
            of the residuals' energy to keep, from which each tensor's rank is chosen.
        stages, example_inputs, calls: as for :func:`find_stages`.

    Raises:
        LoRunError: as :func:`find_stages`; config and rank together, or an option that means
            nothing here; weights that are not finite; a parametrised or lazy stage.
    """
    if config is not None and rank is not None:
        raise LoRunError("expected config or rank, found both: give the rank as r in the LoraConfig")
    stage_map = find_stages(dun, stages=stages, example_inputs=example_inputs, calls=calls)
    modules = [site.module for group in stage_map.groups for site in group.sites]
    check_plain(dun, modules)
    check_reachable(dun, modules)
    check_dense(dun)
    check_sound(dun)
    if config is None:
        config = _config_for(dun, stage_map, DEFAULT_RANK if rank is None else rank)
    plans = plan(dun, stage_map, config)

    base = copy_network(dun)
    factored = {group.name: _Factored(dun, group, plans[group.name]) for group in stage_map.groups}
    for group in stage_map.groups:
        share(base, group, factored[group.name].base)
    adapters = {
        (group.name, site): factored[group.name].adapter(i)
        for group in stage_map.groups
        for i, site in enumerate(group.sites)
    }
    errors = {group.name: factored[group.name].errors for group in stage_map.groups}
    ranks = {name: {tensor: term.rank for tensor, term in planned.terms.items()} for name, planned in plans.items()}
    return LoRunModel(
        base,
        dataclasses.replace(stage_map, ranks=ranks),
        {DEFAULT_SET: (adapters, config)},
        errors,
        trainable={name for name, p in dun.named_parameters() if p.requires_grad},
    )


class _Factored:
    """One group's tensors, factorised: the base and the adapter of each site."""

    def __init__(self, dun: nn.Module, group: Group, planned: Plan) -> None:
        self.group, terms = group, planned.terms
        self.device = stage_values(dun, group, group.tensors[0])[0].device
        # On the CPU: the matrices are small, and not every accelerator has float64.
        stacks = {
            spec.name: torch.stack([tensor.cpu() for tensor in stage_values(dun, group, spec)])
            for spec in group.tensors
            if not spec.common
        }
        if not all(bool((stack == stack[0]).all()) for stack in stacks.values()):
            stacks = align(
                group,
                [dun.get_submodule(site.module) for site in group.sites],
                stacks,
                {name: term.rank for name, term in terms.items()},
                planned.kept,
            )
        self.base: dict[str, Tensor] = {}
        self.errors: dict[str, list[tuple[float, float]]] = {}  # norm lost, norm
        self._terms: dict[str, list[LowRank]] = {}
        self._private: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(0)
        for spec in group.tensors:
            if spec.common:
                continue
            stack = stacks[spec.name]
            if spec.name not in terms:
                self._private[spec.name] = stack
                self.base[spec.name] = _mean(stack)
                continue
            matrices = stack.reshape(len(stack), *spec.matrix)
            factors, scaling = factorise(matrices, terms[spec.name].rank), terms[spec.name].scaling
            self.base[spec.name] = factors.base.to(stack.dtype).reshape(spec.shape)
            norms = torch.linalg.matrix_norm(matrices.to(factors.base.dtype))
            self.errors[spec.name] = list(zip(factors.error.sqrt().tolist(), norms.tolist()))
            self._terms[spec.name] = [
                LowRank(a.to(stack.dtype), (b / scaling).to(stack.dtype), scaling)
                if bool((b @ a).any())
                else untrained(spec.matrix, factors.rank, scaling, stack, generator)
                for a, b in zip(factors.a, factors.b)
            ]

    def adapter(self, index: int) -> StageAdapter:
        private = {}
        for spec in self.group.tensors:
            if spec.name in self._private:
                value = self._private[spec.name][index].clone()
                trains = not spec.buffer and (value.is_floating_point() or value.is_complex())
                private[spec.name] = value if spec.buffer else nn.Parameter(value, requires_grad=trains)
        frozen = [spec.name for spec in self.group.tensors if spec.frozen]
        adapter = StageAdapter({name: terms[index] for name, terms in self._terms.items()}, private, frozen)
        return adapter.to(self.device)


def _mean(stack: Tensor) -> Tensor:
    if not (stack.is_floating_point() or stack.is_complex()):
        return stack[0].clone()
    return stack.to(torch.complex128 if stack.is_complex() else torch.float64).mean(0).to(stack.dtype)


def _config_for(dun: nn.Module, stage_map: StageMap, rank: int | float) -> LoraConfig:
    """The LoraConfig that a rank, or a share of energy, stands for."""
    if (
        isinstance(rank, bool)
        or not isinstance(rank, (int, float))
        or not 0 < rank < float("inf")
        or (rank >= 1 and rank != int(rank))
    ):
        raise LoRunError(
            f"expected a rank of 1 or more, or a share of energy between 0 and 1, found {rank!r}: choose one"
        )
    if rank >= 1:
        return LoraConfig(r=int(rank), lora_alpha=int(rank))
    ranks: dict[str, int] = {}
    for group in stage_map.groups:
        for spec in group.tensors:
            if spec.smaller(1):
                stack = torch.stack(list(stage_values(dun, group, spec)))
                found = rank_for_energy(stack.reshape(len(stack), *spec.matrix), rank)
                ranks[spec.name] = max(found, ranks.get(spec.name, 1))
    pattern = {"^" + re.escape(name): found for name, found in ranks.items()}
    pattern.update({"^" + re.escape(name.removesuffix(".weight")): found for name, found in ranks.items()})
    return LoraConfig(rank_pattern=pattern, alpha_pattern=dict(pattern))

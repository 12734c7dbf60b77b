"""Convert a trained unfolding network: find its stages, choose ranks, factorise, put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from .errors import LoRunError
from .factorise.align import align
from .factorise.allocate import allocate
from .factorise.plan import Plan, plan
from .factorise.ranks import config_for_rank
from .model.lorun_model import DEFAULT_SET, LoRunModel
from .network.adapter import StageAdapter
from .network.assemble import share
from .network.batches import Batches
from .network.converted import AdapterSet
from .peft_format.options import config_of_ranks
from .stages.checks import check_dense, check_finite, check_parameters, check_reachable
from .stages.find import find_stages
from .stages.fold import DEFAULT_RANK
from .stages.stage_map import Group
from .stages.tensors import stage_values
from .terms.factors import factorise
from .terms.lowrank import LowRank, untrained
from .training.duration import Duration
from .util.modules import copy_network
from .util.seeds import seeded

if TYPE_CHECKING:
    import os

    from .training.distill import Loss


def convert(
    dun: nn.Module,
    config: LoraConfig | None = None,
    *,
    rank: int | float | None = None,
    budget: int | float | None = None,
    stages: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    example_inputs: Sequence[object] | None = None,
    calls: Mapping[str, int] | None = None,
    calibration: Iterable[Any] | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    loss: Loss | None = None,
    resume_from: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> LoRunModel:
    """Collapse the repeated denoisers of ``dun`` into one base and a low-rank adapter per stage.

    The network itself is left untouched. Without data the quality falls, as the stages of a
    trained network have little in common; ``calibration`` brings it back. A module called in a loop
    is shared already, and its adapters start at zero.

    Args:
        dun: the trained network.
        config: a PEFT ``LoraConfig``, with names relative to the denoiser. Read are ``r``,
            ``lora_alpha``, ``use_rslora``, ``rank_pattern``, ``alpha_pattern``,
            ``target_modules``, ``exclude_modules``, ``target_parameters`` and
            ``modules_to_save`` (private by request).
        rank: instead of ``config``: the rank of all adapters (default 8), or, in 0..1, the part
            of the residuals' energy to keep, from which each tensor's rank is chosen.
        budget: instead of these: how many parameters the whole network may have, or, in 0..1, which
            part of what it has. Ranks, and the tensors that get no base, are chosen so as to keep most energy of
            the stages' weights and, with ``calibration``, of what these do to the output.
        stages, example_inputs, calls: as for :func:`find_stages`.
        calibration, minutes, steps, loss, resume_from, seed: distil ``dun`` into the conversion, as
            :meth:`LoRunModel.recover` does.

    Raises:
        LoRunError: as :func:`find_stages` and :meth:`LoRunModel.recover`; more than one of config,
            rank and budget, or an option that means nothing here; weights that are not finite; a
            parametrised or lazy stage.
    """
    batches = None
    if calibration is not None:
        Duration(minutes, steps)
        with seeded(seed):
            batches = Batches(calibration)
    elif any(value is not None for value in (minutes, steps, loss, resume_from)):
        raise LoRunError("expected calibration to recover with, found none: pass batches, or leave the rest out")
    lorun = collapse(
        dun,
        config,
        rank=rank,
        budget=budget,
        stages=stages,
        example_inputs=example_inputs,
        calls=calls,
        calibration=batches,
        seed=seed,
    )
    if batches is not None:
        lorun.recover(dun, batches, minutes=minutes, steps=steps, loss=loss, resume_from=resume_from, seed=seed)
    return lorun


def collapse(
    dun: nn.Module,
    config: LoraConfig | None = None,
    *,
    rank: int | float | None = None,
    budget: int | float | None = None,
    stages: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    example_inputs: Sequence[object] | None = None,
    calls: Mapping[str, int] | None = None,
    calibration: Batches | None = None,
    seed: int = 0,
    without_base: Collection[str] = (),
) -> LoRunModel:
    """:func:`convert` up to where recovery starts.

    ``calibration`` says where a budget is best allocation, and with it tensors get no base where that is not worth its
    parameters; ``without_base`` names them for a config.
    """
    given = [name for name, value in (("config", config), ("rank", rank), ("budget", budget)) if value is not None]
    if len(given) > 1:
        raise LoRunError(f"expected one of config, rank and budget, found {' and '.join(given)}: give one")
    stage_map = find_stages(dun, stages=stages, example_inputs=example_inputs, calls=calls)
    modules = [site.module for group in stage_map.groups for site in group.sites]
    check_parameters(dun, modules)
    check_reachable(dun, modules)
    check_dense(dun)
    check_finite(dun)
    if budget is not None:
        sensitivity = None
        if calibration is not None:
            from .factorise.weigh import weigh

            sensitivity = weigh(dun, stage_map, calibration, seed)
        allocation = allocate(dun, stage_map, budget, sensitivity)
        if calibration is not None:
            from .training.processes import broadcast

            allocation = broadcast(allocation)
        config, without_base = config_of_ranks(allocation.ranks), allocation.without_base
    elif config is None:
        config = config_for_rank(dun, stage_map, DEFAULT_RANK if rank is None else rank)
    plans = plan(dun, stage_map, config)
    # Of a tensor without a low-rank term, which stays each stage's own, nothing else would be left.
    stage_map = stage_map.dropping_bases({name: set(without_base) & p.terms.keys() for name, p in plans.items()})

    base = copy_network(dun)
    factored = {group.name: _Factored(dun, group, plans[group.name]) for group in stage_map.groups}
    for group in stage_map.groups:
        share(base, group, factored[group.name].base)
    adapters = {
        (group.name, site): factored[group.name].adapter(i)
        for group in stage_map.groups
        for i, site in enumerate(group.sites)
    }
    residuals = {group.name: factored[group.name].residuals for group in stage_map.groups}
    ranks = {name: {tensor: term.rank for tensor, term in planned.terms.items()} for name, planned in plans.items()}
    return LoRunModel(
        base,
        dataclasses.replace(stage_map, ranks=ranks),
        {DEFAULT_SET: AdapterSet(adapters, config)},
        residuals,
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
                {
                    spec.name: terms[spec.name].rank
                    for spec in group.tensors
                    if spec.name in terms and not spec.without_base
                },
                planned.kept,
            )
        self.base: dict[str, Tensor] = {}
        self.residuals: dict[str, list[tuple[float, float]]] = {}  # norm lost, norm
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
            factors, scaling = factorise(matrices, terms[spec.name].rank, spec.without_base), terms[spec.name].scaling
            self.base[spec.name] = factors.base.to(stack.dtype).reshape(spec.shape)
            norms = torch.linalg.matrix_norm(matrices.to(factors.base.dtype))
            self.residuals[spec.name] = list(zip(factors.error.sqrt().tolist(), norms.tolist()))
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

"""Convert a trained unfolding network: find its stages, choose ranks, factorise, put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from torch import nn

from .errors import LoRunError
from .factorise.allocate import allocate
from .factorise.group import factorise_group
from .factorise.plan import plan
from .factorise.ranks import config_for_energy, config_for_rank
from .model.lorun_model import DEFAULT_SET, LoRunModel
from .network.adapter import StageAdapter
from .network.assemble import share
from .network.batches import Batches
from .network.converted import AdapterSet, Converted
from .peft_format.options import config_of_ranks
from .stages.checks import check_dense, check_finite, check_parameters, check_reachable
from .stages.find import find_stages
from .stages.fold import DEFAULT_RANK
from .terms.registry import kind_of
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
    rank: int | None = None,
    energy: float | None = None,
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

    The network itself stays as it is. Without data the quality falls, since the stages of a trained network have
    little in common; ``calibration`` brings it back. A module that is called in a loop is shared already, and its
    adapters start at zero.

    Args:
        dun: the trained network.
        config: a PEFT ``LoraConfig``, with names relative to the denoiser. It is read for ``r``, ``lora_alpha``,
            ``use_rslora``, ``rank_pattern``, ``alpha_pattern``, ``target_modules``, ``exclude_modules``,
            ``target_parameters`` and ``modules_to_save`` (which stay each stage's own). A config of another
            ``peft_type`` asks for another kind of adapter, see ``lorun_adapt/terms``.
        rank: instead of ``config``: the rank of all adapters, 8 by default.
        energy: instead of ``config``: the share (0 to 1) of the residuals' energy to keep, from which the rank of each
            tensor follows.
        budget: instead of ``config``: how many parameters the whole network may have, or, in 0..1, what share of those
            it has. The ranks, and the tensors that get no base, are chosen so as to keep most energy of the stages'
            weights and, with ``calibration``, of what these do to the output.
        stages, example_inputs, calls: as for :func:`find_stages`.
        calibration, minutes, steps, loss, resume_from, seed: distil ``dun`` into the conversion, as
            :meth:`LoRunModel.recover` does.

    Raises:
        LoRunError: as :func:`find_stages` and :meth:`LoRunModel.recover`; more than one of config, rank, energy and
            budget, or an option that means nothing here; weights that are not finite; a parametrised or lazy stage.

    >>> import lorun_adapt, torch
    >>> from lorun_adapt.util.toy import ToyUnfoldingNet
    >>> net = ToyUnfoldingNet()
    >>> lorun = lorun_adapt.convert(net, rank=2)
    >>> lorun(torch.rand(1, 1, 8, 8)).shape
    torch.Size([1, 1, 8, 8])
    """
    batches = None
    if calibration is not None:
        Duration(minutes, steps)
        with seeded(seed):
            batches = Batches(calibration)
    elif any(value is not None for value in (minutes, steps, loss, resume_from)):
        raise LoRunError(
            "minutes, steps, loss and resume_from are for recovery: pass calibration too, or leave them out"
        )
    converted = collapse(
        dun,
        config,
        rank=rank,
        energy=energy,
        budget=budget,
        stages=stages,
        example_inputs=example_inputs,
        calls=calls,
        calibration=batches,
        seed=seed,
    )
    lorun = LoRunModel(converted)
    if batches is not None:
        lorun.recover(dun, batches, minutes=minutes, steps=steps, loss=loss, resume_from=resume_from, seed=seed)
    return lorun


def collapse(
    dun: nn.Module,
    config: LoraConfig | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | float | None = None,
    stages: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    example_inputs: Sequence[object] | None = None,
    calls: Mapping[str, int] | None = None,
    calibration: Batches | None = None,
    seed: int = 0,
    without_base: Collection[str] = (),
) -> Converted:
    """:func:`convert` up to where recovery starts.

    Args:
        calibration: says where a budget is best spent.
        without_base: names of tensors that get no base; a budget chooses them itself.
    """
    named = {"config": config, "rank": rank, "energy": energy, "budget": budget}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise LoRunError(f"{' and '.join(given)} exclude each other: give one of config, rank, energy and budget")
    stage_map = find_stages(dun, stages=stages, example_inputs=example_inputs, calls=calls)
    modules = [site.module for group in stage_map.groups for site in group.sites]
    check_parameters(dun, modules)
    check_reachable(dun, modules)
    check_dense(dun)
    check_finite(dun)
    if budget is not None:
        sensitivity = None
        if calibration is not None:
            from .factorise.weigh import measure_sensitivity

            sensitivity = measure_sensitivity(dun, stage_map, calibration, seed)
        allocation = allocate(dun, stage_map, budget, sensitivity)
        if calibration is not None:
            from .training.processes import broadcast  # training needs libraries that conversion does not

            allocation = broadcast(allocation)
        config, without_base = config_of_ranks(allocation.ranks), allocation.without_base
    elif energy is not None:
        config = config_for_energy(dun, stage_map, energy)
    elif config is None:
        config = config_for_rank(DEFAULT_RANK if rank is None else rank)
    plans, kind = plan(dun, stage_map, config), kind_of(config.peft_type)
    # A tensor without a term stays each stage's own, and without a base nothing of it would be left.
    stage_map = stage_map.dropping_bases({name: set(without_base) & p.terms.keys() for name, p in plans.items()})

    base = copy_network(dun)
    factorised = {group.name: factorise_group(dun, group, plans[group.name], kind) for group in stage_map.groups}
    adapters: dict[int, dict[str, StageAdapter]] = {stage: {} for stage in range(len(stage_map))}
    for group in stage_map.groups:
        share(base, group, factorised[group.name].base)
        for site, adapter in zip(group.sites, factorised[group.name].adapters):
            adapters[site.stage][group.name] = adapter
    ranks = {name: {tensor: term.rank for tensor, term in planned.terms.items()} for name, planned in plans.items()}
    return Converted(
        base,
        dataclasses.replace(stage_map, ranks=ranks),
        {DEFAULT_SET: AdapterSet(adapters, config)},
        dict.fromkeys(adapters, DEFAULT_SET),
        {name: item.residuals for name, item in factorised.items()},
        trainable_names=frozenset(name for name, p in dun.named_parameters() if p.requires_grad),
    )

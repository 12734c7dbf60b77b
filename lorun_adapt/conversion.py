"""Convert a trained unfolding network: find its stages, choose ranks, factorise, assemble."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig
from torch import nn

from .disk.folder import as_path
from .errors import LoRunError
from .factorise.aligned import aligned
from .factorise.allocate import Allocation, allocate, allocate_for_speed
from .factorise.fresh import untrained_set
from .factorise.group import factorise_group
from .factorise.plan import Plan, plan
from .factorise.ranks import config_for_energy, config_for_rank
from .model.lorun_model import DEFAULT_SET, LoRunModel
from .network.adapter import StageAdapter
from .network.assemble import copy_for_base, share_base
from .network.batches import Batches
from .network.converted import AdapterSet, Converted
from .network.divergence import warn_if_it_diverges
from .network.kept import check_nothing_is_kept
from .network.observe import forward_arguments
from .network.operations import count_operations
from .network.report import make_report
from .network.sharing import ties_of
from .network.unseen import check_adapters_are_seen
from .peft_format.options import config_of_ranks
from .stages.checks import check_dense, check_finite, check_parameters, check_reachable
from .stages.find import find_stages
from .stages.fold import DEFAULT_RANK
from .stages.stage_map import StageMap
from .terms.registry import kind_of
from .training.duration import Duration, has_time_for_trials
from .util.copying import check_separate, copy_network
from .util.modules import trainable_names
from .util.nested import device_of, to_device
from .util.seeds import seeded
from .util.torch_modes import in_own_modes

if TYPE_CHECKING:
    import os

    from .training.distill import Loss

PROBES_TO_REPEAT = 4  # batches to measure sensitivities on, however long that takes
TRIED_BELOW = 0.2  # of the denoisers' parameters; with more, both ways come as close to the original in the end
WEIGHING = 0.05  # the fraction of the minutes of recovery that measuring sensitivities for a budget may take


@in_own_modes
def convert(
    dun: nn.Module,
    config: LoraConfig | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | float | None = None,
    faster: float | None = None,
    stages: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    example_inputs: Sequence[object] | None = None,
    calls: Mapping[str, int] | None = None,
    beyond: str = "error",
    share: bool = True,
    calibration: Iterable[Any] | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    loss: Loss | None = None,
    also: str | Sequence[str] = (),
    recompute: bool = False,
    resume_from: str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> LoRunModel:
    """Collapse the repeated denoisers of ``dun`` into one base and a low-rank adapter per stage.

    The original network is not changed. Conversion alone reduces the quality, since the stages of a trained network
    have little in common; recovery on ``calibration`` restores it. With ``example_inputs`` or ``calibration``, a
    warning says if the result diverges. A module that is called in a loop is already shared, so its adapters start at
    zero.

    Args:
        dun: the trained network.
        config: a PEFT ``LoraConfig`` with names relative to the denoiser. These fields are used: ``r``,
            ``lora_alpha``, ``use_rslora``, ``rank_pattern``, ``alpha_pattern``, ``target_modules``,
            ``exclude_modules``, ``target_parameters`` and ``modules_to_save`` (modules that each stage keeps as its
            own). ``lora_bias`` is accepted without effect, since each stage has its own biases. Another ``peft_type``
            selects another kind of adapter, see ``lorun_adapt/terms``.
        rank: instead of ``config``, the rank of all adapters; 8 by default.
        energy: instead of ``config``, the share of the residuals' energy to keep, 0 to 1. Each tensor gets the lowest
            rank that keeps it.
        budget: instead of ``config``, the number of parameters of the converted network, or, between 0 and 1, its
            share of the original number. The ranks, and the tensors that get no base, are chosen to keep as much
            energy of the weights as possible; with ``calibration``, it is weighted by its effect on the output. If the
            denoisers become at least five times smaller, a recovery of at least ten minutes or 1,000 steps begins with
            trials, which show whether a base for every tensor is better.
        faster: instead of ``config``, a factor above 1. The conversion uses the largest budget with which the network
            takes at most 1 / ``faster`` of the original's operations (convolutions and matrix products) on the example
            inputs, which are required. Tensors without a base save operations, see ``guides/speed.md``.
        stages, example_inputs, calls: as in :func:`find_stages`. The first batch of ``calibration`` serves as example
            inputs, unless others are given.
        beyond: what runs if a module is called in a loop more often than there are stages; see
            :attr:`LoRunModel.beyond`.
        share: if False, each stage keeps its own weights as a frozen base, so nothing is lost and the network becomes
            no smaller. The adapters start at zero: small sets to fine-tune for other noise levels, masks or scanners.
            Give ``rank`` or ``config``, and no calibration, as there is nothing to recover.
        calibration, minutes, steps, loss, also, recompute, resume_from: recover the quality afterwards, as in
            :meth:`LoRunModel.recover`. Minutes include the conversion.
        seed: seed of the random numbers of measuring sensitivities and of recovery. Without ``calibration`` it has no
            effect: a conversion alone is the same each time.

    Returns:
        The converted network with one adapter set, ``default``, in the train/eval mode of ``dun``.

    Raises:
        LoRunError: as :func:`find_stages` and :meth:`LoRunModel.recover`; more than one of config, rank, energy, budget
            and faster; energy, budget, faster or calibration with ``share=False``; a network that gets at its stages'
            weights in a way that adapters do not see (with ``example_inputs`` or ``calibration``); a config field that
            is not supported; NaN or Inf in the weights; a parametrised or lazy module in a stage.

    >>> import lorun_adapt, torch
    >>> from lorun_adapt.util.toy import ToyUnfoldingNet
    >>> net = ToyUnfoldingNet()
    >>> lorun = lorun_adapt.convert(net, rank=2)
    >>> lorun(torch.rand(1, 1, 8, 8)).shape
    torch.Size([1, 1, 8, 8])
    """
    batches, duration, started = None, None, time.monotonic()
    if calibration is not None:
        duration = Duration(minutes, steps)
        with seeded(seed):
            batches = Batches(calibration)
        if example_inputs is None:
            example_inputs = to_device(forward_arguments(dun, batches.first), device_of(dun))
    elif any(value is not None for value in (minutes, steps, loss, resume_from)) or also or recompute:
        raise LoRunError(
            "minutes, steps, loss, also, recompute and resume_from need calibration: pass it as well, or leave them out"
        )
    found = conversions(
        dun,
        config,
        rank=rank,
        energy=energy,
        budget=budget,
        faster=faster,
        stages=stages,
        example_inputs=example_inputs,
        calls=calls,
        share=share,
        calibration=batches,
        duration=duration,
        repeatable=resume_from is not None,
        seed=seed,
        align_channels=batches is None,
    )
    candidates = [LoRunModel(converted) for converted in found]
    for lorun in candidates:
        lorun.beyond = beyond
    if batches is not None:
        from .model.trials import recover_best  # imported here: training needs more libraries than conversion

        assert duration is not None
        left = duration.after(time.monotonic() - started)
        path = None if resume_from is None else as_path(resume_from)
        lorun, _ = recover_best(
            candidates,
            dun,
            batches,
            left,
            loss=loss,
            also=also,
            recompute=recompute,
            resume_from=path,
            seed=seed,
        )
    elif example_inputs is not None:
        warn_if_it_diverges(lorun.network, dun, lorun.stage_map, example_inputs, "recover it with calibration=")
    return lorun


@in_own_modes
def conversions(
    dun: nn.Module,
    config: LoraConfig | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | float | None = None,
    faster: float | None = None,
    stages: str | Sequence[str] | Sequence[Sequence[str]] | None = None,
    example_inputs: Sequence[object] | None = None,
    calls: Mapping[str, int] | None = None,
    share: bool = True,
    calibration: Batches | None = None,
    duration: Duration | None = None,
    repeatable: bool = False,
    seed: int = 0,
    without_base: Collection[str] = (),
    align_channels: bool = True,
) -> list[Converted]:
    """Convert without recovery; see :func:`convert` for the arguments not listed here.

    Args:
        calibration: batches to measure the sensitivity of the output on, which decides how a budget is divided.
        duration: how long recovery takes afterwards; measuring ends after a twentieth of the minutes.
        repeatable: measure on a fixed number of batches instead, however long that takes, since a run that resumes
            needs the same ranks again.
        without_base: names of tensors that get no base; with a budget, they are chosen automatically.
        align_channels: bring the hidden channels of the stages into one order, if the outputs for ``example_inputs``
            stay the same. Not useful before recovery, which factorises the original again, in its own order.

    Returns:
        The conversion. It is followed by a second one, with a base for every tensor, if the budget makes the denoisers
        at least five times smaller, the first one lacks some bases, the second one fits the budget, and recovery is
        long enough to try both.
    """
    energy, budget, faster = (n.item() if isinstance(n, np.generic) else n for n in (energy, budget, faster))
    named = {"config": config, "rank": rank, "energy": energy, "budget": budget, "faster": faster}
    given = [name for name, value in named.items() if value is not None]
    if len(given) > 1:
        raise LoRunError(f"{' and '.join(given)} exclude each other: give only one of {', '.join(named)}")
    if not isinstance(share, bool):
        raise LoRunError(
            f"expected True or False for share, found {share!r}: pass share=False to keep every stage's weights"
        )
    if faster is not None and example_inputs is None:
        raise LoRunError("faster counts the operations of a forward: pass example_inputs or calibration as well")
    if not share and any(value is not None for value in (energy, budget, faster, calibration)):
        raise LoRunError(
            "share=False keeps every stage's weights, so nothing is lost that could be recovered or traded for size: "
            "give rank or config, and leave energy, budget, faster and calibration out"
        )
    stage_map = dataclasses.replace(
        find_stages(dun, stages=stages, example_inputs=example_inputs, calls=calls), shared=share
    )
    modules = [site.module for site in stage_map.sites]
    check_parameters(dun, modules)
    check_reachable(dun, modules)
    check_dense(dun)
    check_finite(dun)
    choices: list[tuple[LoraConfig, Collection[str]]] = []  # ranks, and tensors without a base
    if budget is not None or faster is not None:
        sensitivity = None
        if calibration is not None:
            from .factorise.weigh import measure_sensitivity

            minutes = duration.minutes if duration is not None else None
            limits: dict[str, Any] = {}
            if minutes is not None:
                limits = {"probes": PROBES_TO_REPEAT} if repeatable else {"seconds": 60 * minutes * WEIGHING}
            sensitivity = measure_sensitivity(dun, stage_map, calibration, seed, **limits)
        if faster is None:
            assert budget is not None
            allocation = allocate(dun, stage_map, budget, sensitivity)
        else:
            assert example_inputs is not None
            allocation = allocate_for_speed(
                dun, stage_map, faster, _counting_operations(dun, stage_map, example_inputs), sensitivity
            )
        allocations = [allocation]
        if budget is not None and duration is not None and allocation.without_base and has_time_for_trials(duration):
            with contextlib.suppress(LoRunError):  # there is no room
                allocations.append(allocate(dun, stage_map, budget, sensitivity, base=True))
        if calibration is not None:
            from .training.processes import broadcast  # imported here: training needs more libraries than conversion

            allocations = broadcast(allocations)
        choices += [(config_of_ranks(chosen.ranks), chosen.without_base) for chosen in allocations]
    elif energy is not None:
        choices.append((config_for_energy(dun, stage_map, energy), without_base))
    else:
        choices.append((config or config_for_rank(DEFAULT_RANK if rank is None else rank), without_base))
    first = _convert_to(*choices[0], dun, stage_map, example_inputs, align_channels)
    report = make_report(first)
    if report.denoisers_after.num_parameters > TRIED_BELOW * report.denoisers_before.num_parameters:
        return [first]
    return [first, *(_convert_to(*choice, dun, stage_map, None, align_channels) for choice in choices[1:])]


def _convert_to(
    config: LoraConfig,
    without_base: Collection[str],
    dun: nn.Module,
    stage_map: StageMap,
    example_inputs: Sequence[object] | None,
    align_channels: bool,
) -> Converted:
    """Convert at the ranks of ``config``; the arguments are as in :func:`conversions`."""
    share = stage_map.shared
    plans, kind = plan(dun, stage_map, config), kind_of(config.peft_type)
    stage_map = _dropping_bases(stage_map, plans, without_base)
    base = copy_for_base(dun, stage_map) if share else copy_network(dun)
    check_separate(dun, base)
    residuals: dict[str, dict[str, list[tuple[float, float]]]] = {group.name: {} for group in stage_map.groups}
    if share:
        adapters: dict[int, dict[str, StageAdapter]] = {stage: {} for stage in range(len(stage_map))}
        source = aligned(dun, stage_map, plans, kind, example_inputs if align_channels else None)
        for group in stage_map.groups:
            factorised = factorise_group(source, group, plans[group.name], kind)
            share_base(base, group, factorised.base)
            residuals[group.name] = factorised.residuals
            for site, adapter in zip(group.sites, factorised.adapters):
                adapters[site.stage][group.name] = adapter
        default = AdapterSet(adapters, config)
    else:
        default = untrained_set(base, stage_map, config, plans, torch.Generator().manual_seed(0))
        _warn_if_it_is_large(default, stage_map)
    ranks = {name: {tensor: setting.rank for tensor, setting in p.settings.items()} for name, p in plans.items()}
    converted = Converted(
        base,
        dataclasses.replace(stage_map, ranks=ranks),
        {DEFAULT_SET: default},
        dict.fromkeys(default.adapters, DEFAULT_SET),
        residuals,
        trainable_names=trainable_names(dun),
        ties=ties_of(dun),
    )
    if share:
        _warn_if_it_grows(converted)
    if example_inputs is not None:
        check_nothing_is_kept(dun, stage_map, example_inputs)
        check_adapters_are_seen(converted, example_inputs)
    return converted


def _dropping_bases(stage_map: StageMap, plans: Mapping[str, Plan], names: Collection[str]) -> StageMap:
    """Drop the bases of tensors that get a term; another is private to each stage, so that would save nothing."""
    return stage_map.dropping_bases({group: set(names) & planned.settings.keys() for group, planned in plans.items()})


def _counting_operations(
    dun: nn.Module, stage_map: StageMap, inputs: Sequence[object]
) -> Callable[[Allocation], float]:
    """Return a function that counts the operations of a conversion, as a share of the original's.

    They depend on the ranks and on which tensors have a base, so the terms need not be fitted.
    """
    whole, base = count_operations(dun, inputs), copy_network(dun)

    def operations(allocation: Allocation) -> float:
        config = config_of_ranks(allocation.ranks)
        plans = plan(dun, stage_map, config)
        dropping = _dropping_bases(stage_map, plans, allocation.without_base)
        default = untrained_set(base, dropping, config, plans, torch.Generator().manual_seed(0))
        active = dict.fromkeys(default.adapters, DEFAULT_SET)
        candidate = LoRunModel(Converted(base, dropping, {DEFAULT_SET: default}, active, {}, trainable_names(dun)))
        return count_operations(candidate, inputs) / whole

    return operations


def _warn_if_it_is_large(held: AdapterSet, stage_map: StageMap) -> None:
    adapters = [adapter for stage in held.adapters.values() for adapter in stage.values()]
    of_set = sum(parameter.numel() for adapter in adapters for parameter in adapter.parameters())
    of_stages = sum(len(group.sites) * group.num_parameters for group in stage_map.groups)
    if of_set >= of_stages:
        warnings.warn(
            f"a set of adapters has {of_set:,} parameters, and the stages of {stage_map.network} have {of_stages:,}: "
            "choose a lower rank, at which terms are smaller than the tensors",
            stacklevel=7,
        )


def _warn_if_it_grows(converted: Converted) -> None:
    report = make_report(converted)
    before, after = report.network_before.num_parameters, report.network_after.num_parameters
    if after <= before:
        return
    advice = "choose a lower rank, or exclude the tensors that an adapter makes larger"
    specs = [spec for group in converted.stage_map.groups for spec in group.tensors]
    if all(spec.frozen or spec.buffer for spec in specs):
        advice = (
            "no tensor of its stages is adapted, as all have requires_grad=False beside parameters that train: call "
            "requires_grad_(True) on the network first"
        )
    elif report.denoisers_before.num_parameters <= report.base.num_parameters:
        advice = (
            "its stages shared a denoiser already, so adapters make it no smaller; they let stages differ, and hold "
            "what other noise levels need"
        )
    warnings.warn(
        f"the conversion of {converted.stage_map.network} grows from {before:,} to {after:,} parameters, "
        f"{after / before:.2f} times as many: {advice}",
        stacklevel=7,
    )

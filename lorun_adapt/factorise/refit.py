"""Factorise the original network again, weighted by the sensitivity of its output, into a converted network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from ..network.adapter import private_tensors, terms_of
from ..network.converted import Converted
from ..stages.tensors import stage_parameters, stage_values
from ..terms.term import Setting, Weighting
from .sensitivity import Sensitivity


@torch.no_grad()
def refit(
    converted: Converted,
    source: nn.Module,
    sensitivity: Mapping[tuple[str, str], Sensitivity],
    damping: float,
    time_left: Callable[[], bool] = lambda: True,
) -> bool:
    """Fit the base and the active adapters of ``converted`` to the weights of ``source``, in place.

    Groups of unknown sensitivity, and tensors that their stages share already, do not change. Private tensors are
    copied from ``source``.

    Args:
        converted: the network to change.
        source: a network of the original class.
        sensitivity: by group and tensor, from :func:`~lorun_adapt.factorise.sensitivity.sensitivities`.
        damping: the fraction of the mean sensitivity that is added to every direction.
        time_left: asked before each tensor; the tensors that are left when it says no do not change.

    Returns:
        Whether every tensor was fitted.
    """
    choice = converted.choice
    measured = {name for name, _ in sensitivity}
    for group in converted.stage_map.groups:
        if group.name not in measured:
            continue
        adapters = [choice[site.stage][group.name] for site in group.sites]
        terms = [terms_of(adapter) for adapter in adapters]
        for spec in group.tensors:
            if spec.common:
                continue
            values = stage_values(source, group, spec)
            if spec.name not in terms[0]:
                for adapter, value in zip(adapters, values):
                    private_tensors(adapter)[spec.name].copy_(value)
            elif len({id(tensor) for tensor in stage_parameters(source, group, spec)}) > 1:
                if not time_left():
                    return False
                first, known = terms[0][spec.name], sensitivity.get((group.name, spec.name))
                stack = torch.stack([value.cpu() for value in values])
                setting = Setting(first.rank, first.scaling)
                weighting = None if known is None else Weighting(known.rows, known.columns, damping)
                fitted = type(first).fit(stack, spec, setting, weighting=weighting)
                stage_parameters(converted.base, group, spec)[0].copy_(fitted.base)
                for own, new in zip(terms, fitted.terms):
                    for held, value in zip(own[spec.name].state_dict().values(), new.state_dict().values()):
                        held.copy_(value)
    return True

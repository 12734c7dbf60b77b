"""Factorise the original network again, weighted by the sensitivity of its output, into a converted network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from ..network.adapter import private_tensors, terms_of
from ..network.converted import Converted
from ..stages.tensors import stage_parameters, stage_values
from ..terms.term import Setting, Term, Weighting
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

    Groups of unknown sensitivity, tensors that their stages share already, and tensors whose terms differ in kind or
    rank between the stages do not change. Private tensors are copied from ``source``.

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
            found = [own[spec.name] for own in terms if spec.name in own]
            for adapter, own, value in zip(adapters, terms, values):
                if spec.name not in own:
                    private_tensors(adapter)[spec.name].copy_(value)
            shared = len({id(tensor) for tensor in stage_parameters(source, group, spec)}) == 1
            if len(found) == len(terms) and not shared and _are_alike(found):
                if not time_left():
                    return False
                first, known = found[0], sensitivity.get((group.name, spec.name))
                stack = torch.stack([value.cpu() for value in values])
                setting = Setting(first.rank, first.scaling)
                weighting = None if known is None else Weighting(known.rows, known.columns, damping)
                fitted = type(first).fit(stack, spec, setting, weighting=weighting)
                stage_parameters(converted.base, group, spec)[0].copy_(fitted.base)
                for term, new in zip(found, fitted.terms):
                    for held, value in zip(term.state_dict().values(), new.state_dict().values()):
                        held.copy_(value)
    return True


def _are_alike(terms: Sequence[Term]) -> bool:
    """Whether the terms have the same kind, scaling and shapes; adapters that come from PEFT may differ."""
    settings = [
        (type(term), term.scaling, {name: tensor.shape for name, tensor in term.state_dict().items()}) for term in terms
    ]
    return all(setting == settings[0] for setting in settings)

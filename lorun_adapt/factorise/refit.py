"""Factorise the original anew by what its output is sensitive to, and put that into a converted network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..network.adapter import lowrank_terms, private_tensors
from ..stages.tensors import stage_parameters, stage_values
from ..terms.factors import factorise_weighted
from .sensitivity import Sensitivity

if TYPE_CHECKING:
    from ..model.lorun_model import LoRunModel


def refit(
    lorun: LoRunModel, source: nn.Module, sensitivity: Mapping[tuple[str, str], Sensitivity], damping: float
) -> None:
    """Make the stages of ``lorun`` those of ``source``, as near as its ranks allow, in the weights of ``sensitivity``.

    Tensors of which no sensitivity is known stay as they are, private ones become those of ``source``.
    """
    with torch.no_grad():
        for group in lorun.stage_map.groups:
            adapters = [lorun.adapter_of(group, site) for site in group.sites]
            terms = [lowrank_terms(adapter) for adapter in adapters]
            for spec in group.tensors:
                values = stage_values(source, group, spec) if not spec.common else []
                if spec.name in terms[0]:
                    known = sensitivity.get((group.name, spec.name))
                    if known is None:
                        continue
                    stack = torch.stack([value.cpu() for value in values]).reshape(len(values), *spec.matrix)
                    found = factorise_weighted(
                        stack, terms[0][spec.name].rank, known.rows, known.columns, damping, spec.without_base
                    )
                    stage_parameters(lorun.base, group, spec)[0].copy_(found.base.reshape(spec.shape))
                    for own, a, b in zip(terms, found.a, found.b):
                        own[spec.name].lora_A.copy_(a)
                        own[spec.name].lora_B.copy_(b / own[spec.name].scaling)
                else:
                    for adapter, value in zip(adapters, values):
                        private_tensors(adapter)[spec.name].copy_(value)

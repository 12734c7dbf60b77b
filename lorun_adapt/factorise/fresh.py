"""Create an untrained adapter set, which does not change the base's output."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..network.adapter import StageAdapter, make_adapter
from ..network.converted import AdapterSet
from ..stages.stage_map import StageMap
from ..terms.registry import kind_of
from ..terms.term import Term
from ..util.modules import tensor_of
from .plan import Plan


def untrained_set(
    base: nn.Module,
    stage_map: StageMap,
    config: LoraConfig,
    plans: Mapping[str, Plan],
    generator: torch.Generator = torch.default_generator,
) -> AdapterSet:
    """Return a set with zero terms for the tensors that ``config`` adapts, and copies of the base's other tensors.

    Args:
        base: the base.
        stage_map: the positions of its stages.
        config: the tensors to adapt and their ranks.
        plans: by group, the tensors that get a term, with their ranks and scalings, as :func:`plan` returns them.
        generator: of the random numbers that terms start from.
    """
    kind = kind_of(config.peft_type)
    adapters: dict[int, dict[str, StageAdapter]] = {}
    for group in stage_map.groups:
        for site in group.sites:
            denoiser = base.get_submodule(site.module)
            terms: dict[str, Term] = {}
            private: dict[str, Tensor] = {}
            for spec in group.tensors:
                if spec.common:
                    continue
                value = tensor_of(denoiser, spec.name).detach()
                setting = plans[group.name].settings.get(spec.name)
                if setting is None:
                    private[spec.name] = value.clone()
                else:
                    terms[spec.name] = kind.untrained(spec, setting, value, generator)
            adapters.setdefault(site.stage, {})[group.name] = make_adapter(group, terms, private)
    return AdapterSet(dict(sorted(adapters.items())), config)

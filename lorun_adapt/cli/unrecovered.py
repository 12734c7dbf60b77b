"""What a conversion was before recovery: to show what recovery brought."""

from __future__ import annotations

from collections.abc import Sequence

from peft import LoraConfig
from torch import nn

from ..conversion import conversions
from ..model.lorun_model import LoRunModel
from ..network.adapter import terms_of
from ..peft_format.options import config_of_ranks


def unrecovered(lorun: LoRunModel, original: nn.Module, inputs: Sequence[object]) -> LoRunModel:
    """Return ``original`` converted anew, at the ranks of ``lorun`` and with a base in the same tensors.

    Args:
        lorun: a conversion of ``original`` that shares a base.
        original: the network.
        inputs: the arguments of one forward.
    """
    without_base = {spec.name for group in lorun.stage_map.groups for spec in group.tensors if spec.without_base}
    (converted,) = conversions(
        original,
        _same_ranks(lorun),
        without_base=without_base,
        example_inputs=inputs,
        **lorun.stage_map.as_arguments(),
    )
    return LoRunModel(converted)


def _same_ranks(lorun: LoRunModel) -> LoraConfig:
    """The config that converts the original to the ranks of ``lorun``."""
    choice = lorun.converted().choice
    ranks = {
        name: term.rank
        for group in lorun.stage_map.groups
        for name, term in terms_of(choice[group.sites[0].stage][group.name]).items()
    }
    config = config_of_ranks(ranks)
    config.target_parameters = list(ranks)
    return config

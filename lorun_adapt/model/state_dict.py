"""State dicts of a converted network: they hold the base and the adapters once."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from ..errors import LoRunError
from ..network.eight_bits import EightBits
from ..network.sharing import Places, share_again, shared_places
from ..stages.stage_map import StageMap
from ..util.fingerprint import fingerprint_of
from ..util.modules import distinct_tensors


class Loading(NamedTuple):
    """The state from before a state dict is loaded, to restore or compare afterwards."""

    places: Places
    network: nn.Module
    fingerprint: str


class Model(Protocol):
    """The part of a converted network that the hooks use."""

    stage_map: StageMap
    base: nn.Module
    adapters: nn.ModuleDict
    network: nn.Module
    loading: Loading | None

    def replace_tensors(self, base_changed: bool) -> None:
        """Assemble the network again after its tensors were replaced."""


def register_hooks(model: nn.Module) -> None:
    """Leave the assembled network out of state dicts, since the base and the adapters hold all its tensors.

    What is in eight bits becomes ordinary tensors, which others can load.
    """
    model.register_state_dict_post_hook(_make_plain)
    model.register_load_state_dict_pre_hook(_before_load)
    model.register_load_state_dict_post_hook(_after_load)


def _make_plain(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    floats: dict[int, torch.Tensor] = {}  # made once for what several stages share
    for name in [name for name in state_dict if name.startswith(prefix)]:
        tensor = state_dict[name]
        if name.startswith(f"{prefix}network."):
            del state_dict[name]
        elif isinstance(tensor, EightBits):
            key = id(tensor.numbers)
            if key not in floats:
                floats[key] = tensor.float_values()
            state_dict[name] = floats[key]


def _before_load(model: Model, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for group in model.stage_map.groups:
        for name in [f"{group.sites[0].module}.{spec.name}" for spec in group.tensors if spec.without_base]:
            if (value := state_dict.get(f"{prefix}base.{name}")) is not None and bool(value.any()):
                raise LoRunError(
                    f"{name!r} has no base here, but the state_dict has one: load it into the conversion it "
                    "was saved from"
                )
    for group in model.stage_map.groups if model.stage_map.shared else ():
        for spec in group.tensors:
            names = [f"{prefix}base.{site.module}.{spec.name}" for site in group.sites]
            values = [state_dict[name] for name in names if not spec.common and name in state_dict]
            if any(value is not values[0] and not torch.equal(value, values[0]) for value in values):
                raise LoRunError(
                    f"the stages share {spec.name!r} here, but they differ in it in the state_dict: load it into a "
                    "conversion with share=False, as it was saved from"
                )
    fingerprint = fingerprint_of(distinct_tensors(model.base))
    model.loading = Loading(shared_places(model.base, model.adapters), model.network, fingerprint)
    model.network = nn.Module()  # otherwise load_state_dict would look for the tensors of the assembled network, too


def _after_load(model: Model, incompatible_keys: object) -> None:
    loading = model.loading
    if loading is not None:
        model.loading, model.network = None, loading.network
        share_again(loading.places)  # load_state_dict(assign=True) gives each place a separate tensor
        model.replace_tensors(fingerprint_of(distinct_tensors(model.base)) != loading.fingerprint)

"""."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..errors import LoRunError
from ..network.sharing import share_again, shared_places
from ..util.fingerprint import fingerprint_of
from ..util.modules import distinct_tensors

if TYPE_CHECKING:
    from .lorun_model import LoRunModel


def register_hooks(lorun: LoRunModel) -> None:
    """Leave the network that runs out of state dicts, since base and adapters hold all its tensors, and load as one."""
    lorun.register_state_dict_post_hook(_leave_network_out)
    lorun.register_load_state_dict_pre_hook(_before_load)
    lorun.register_load_state_dict_post_hook(_after_load)


def _leave_network_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state_dict if name.startswith(f"{prefix}network.")]:
        del state_dict[name]


def _before_load(lorun: LoRunModel, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for group in lorun.stage_map.groups:
        for name in [f"{group.sites[0].module}.{spec.name}" for spec in group.tensors if spec.without_base]:
            if (held := state_dict.get(f"{prefix}base.{name}")) is not None and bool(held.any()):
                raise LoRunError(
                    f"expected zeros for {name!r}, which has no base here, found others in the state_dict: load it "
                    "into the conversion that it is of"
                )
    held = fingerprint_of(distinct_tensors(lorun.base))
    lorun._loading = [shared_places(lorun.base, lorun.adapters), lorun.network, held]
    lorun.network = nn.Module()  # else it would be asked for, and given, tensors of its own


def _after_load(lorun: LoRunModel, incompatible_keys: Any) -> None:
    places, lorun.network, held = lorun._loading
    del lorun._loading
    share_again(places)  # load_state_dict(assign=True) puts other tensors into each place
    if fingerprint_of(distinct_tensors(lorun.base)) != held:
        lorun._fingerprint = None
    lorun._assemble_again()

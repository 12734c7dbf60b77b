"""Select the adapter sets to save."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..errors import LoRunError
from ..files.layout import INTERPOLATED
from ..network.converted import Converted
from ..network.noise import between


def select_sets(converted: Converted, names: Sequence[str] | None = None) -> Converted:
    """Return a converted network with some of its sets.

    Stages whose active set is not selected get a selected one: in place of the interpolated set, the one with the
    nearest noise level; otherwise the first that has the stage.

    Args:
        converted: the network.
        names: the sets to keep; by default all except the interpolated one.

    Raises:
        LoRunError: an unknown set or the interpolated one; a stage without an adapter in the selected sets.
    """
    selectable = [name for name in converted.sets if name != INTERPOLATED]
    names = selectable if names is None else list(names)
    for name in names:
        if name not in selectable:
            raise LoRunError(f"cannot save the set {name!r}: choose selected_adapters from {selectable}")
    sets = {name: converted.sets[name] for name in converted.sets if name in names}
    active = {}
    for stage, name in converted.active.items():
        holding = {other: held.info.sigma for other, held in sets.items() if stage in held.adapters}
        if not holding:
            raise LoRunError(f"none of the sets {names} has an adapter for stage {stage}: select one that does")
        levels = {other: level for other, level in holding.items() if level is not None}
        sigma = converted.sets[name].info.sigma if name == INTERPOLATED else None
        if name in holding:
            active[stage] = name
        elif levels and sigma is not None:
            weights = between(sigma, levels)
            active[stage] = max(weights, key=lambda other: weights[other])
        else:
            active[stage] = next(iter(holding))
    return dataclasses.replace(converted, sets=sets, active=active)

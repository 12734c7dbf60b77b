"""Which adapter sets of a network are saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..errors import LoRunError
from ..files.layout import INTERPOLATED
from ..network.converted import Converted
from ..network.noise import between


def selected(converted: Converted, names: Sequence[str] | None = None) -> Converted:
    """A network with some of its sets.

    A stage that runs with another set is taken to run with one of these: where the interpolated set runs, the one that
    is nearest to its noise, and else the first that has the stage.

    Args:
        names: by default all sets but an interpolated one.

    Raises:
        LoRunError: an unknown or interpolated set, none, or sets that lack a stage.
    """
    names = [name for name in converted.sets if name != INTERPOLATED] if names is None else list(names)
    for name in names:
        if name not in converted.sets or name == INTERPOLATED:
            saved = [name for name in converted.sets if name != INTERPOLATED]
            raise LoRunError(f"cannot save the set {name!r}: name some of {saved} in selected_adapters")
    sets = {name: converted.sets[name] for name in converted.sets if name in names}
    active = {}
    for stage, name in converted.active.items():
        holding = {other: held.info.sigma for other, held in sets.items() if stage in held.adapters}
        if not holding:
            raise LoRunError(f"none of the sets {names} has an adapter for stage {stage}: select one that has")
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

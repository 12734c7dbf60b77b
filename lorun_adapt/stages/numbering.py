"""Number the stages of several groups by the loop that runs them, and name the groups."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from torch import nn

from .locations import Location

LONGEST = 90  # characters of a name, which may get a number


def stage_indices(stages_of_groups: Sequence[Sequence[Location]]) -> list[list[int]]:
    """Return the index of the stage for each location of each group.

    Groups in lists of their own are numbered by position, groups that take turns in one list by turn, and groups with
    other numbers in their names by these.

    >>> stage_indices([[("steps.0", None), ("steps.1", None)], [("blocks.0", None), ("blocks.2", None)],
    ...                [("blocks.1", None), ("blocks.3", None)]])
    [[0, 1], [0, 1], [0, 1]]
    >>> stage_indices([[("decoder_1", None), ("decoder_2", None)], [("encoder_2", None)]])
    [[0, 1], [1]]
    """
    numbers = _by_turn(stages_of_groups, [_numbers(locations) for locations in stages_of_groups])
    if all(len(set(n)) == len(n) == len(locations) for n, locations in zip(numbers, stages_of_groups)):
        if len({frozenset(n) for n in numbers}) > 1:
            order = sorted({number for n in numbers for number in n})
            return [[order.index(number) for number in n] for n in numbers]
    return [list(range(len(locations))) for locations in stages_of_groups]


def group_name(locations: Sequence[Location], used: Collection[str]) -> str:
    """Return a name for a group, from the names of its modules without their numbers; it can name a folder.

    >>> group_name([("stage1.encoder", None), ("stage2.encoder", None)], [])
    'stage_encoder'
    """
    parts = re.split(r"[^A-Za-z-]+", locations[0][0])
    name = "_".join(part for part in parts if part).lstrip("-")[:LONGEST] or "denoiser"
    return name if name not in used and not hasattr(nn.ModuleDict(), name) else f"{name}_{len(used)}"


def _numbers(locations: Sequence[Location]) -> list[int]:
    """The first number in each name."""
    found = [re.findall(r"\d+", path) for path, call in locations if call is None]
    return [int(numbers[0]) for numbers in found if numbers]


def _by_turn(stages_of_groups: Sequence[Sequence[Location]], numbers: list[list[int]]) -> list[list[int]]:
    """Replace places in a list that several groups share by the turns in which these come up."""
    lists = [_list_of(locations) for locations in stages_of_groups]
    result = [list(n) for n in numbers]
    for name in {name for name in lists if name is not None and lists.count(name) > 1}:
        groups = [group for group, other in enumerate(lists) if other == name]
        places = sorted(
            (int(path.rpartition(".")[2]), group, i)
            for group in groups
            for i, (path, _) in enumerate(stages_of_groups[group])
        )
        if len({place for place, _, _ in places}) < len(places):
            continue  # two modules in each place: the place is the stage
        turn, seen = 0, set[int]()
        turns = {group: [0] * len(stages_of_groups[group]) for group in groups}
        for _, group, i in places:
            if group in seen:
                turn, seen = turn + 1, set()
            seen.add(group)
            turns[group][i] = turn
        for group in groups:
            result[group] = turns[group]
    return result


def _list_of(locations: Sequence[Location]) -> str | None:
    """The list that all modules are items of, by the number that ends their names."""
    names = {path.rpartition(".")[0] if re.search(r"(^|\.)\d+$", path) else None for path, _ in locations}
    return names.pop() if len(names) == 1 else None

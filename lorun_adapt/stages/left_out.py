"""What of a network is in no stage, and why."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .stage_map import Group, NotTaken

WORTH_LISTING = 0.01  # of the parameters
LISTS = {nn.Sequential, nn.ModuleList, nn.ModuleDict}


def left_out(dun: nn.Module, groups: Sequence[Group], repeated: Sequence[NotTaken]) -> tuple[NotTaken, ...]:
    """Return what is in no stage: what repeats, what is like a stage, and all else with 1 % of the parameters.

    Args:
        dun: the network.
        groups: the stages.
        repeated: what repeats, but is not taken.

    >>> from .stage_map import Site
    >>> dun = nn.ModuleDict({"head": nn.Conv1d(9, 9, 1), "blocks": nn.ModuleList(nn.Linear(2, 2) for _ in "ab")})
    >>> left_out(dun, [Group("denoiser", (Site(0, "blocks.0"), Site(1, "blocks.1")), ())], [])
    (NotTaken(modules=('head',), num_parameters=90, reason='outside the stages'),)
    """
    taken = {site.module for group in groups for site in group.sites}
    listed = [item for item in repeated if _is_outermost(dun, item, taken)]
    covered = taken | {path for item in listed for path in item.modules}
    seen = {id(parameter) for path in covered for parameter in dun.get_submodule(path).parameters()}
    least = WORTH_LISTING * sum(parameter.numel() for parameter in dun.parameters())
    patterns = {_pattern(path) for path in taken if re.search(r"\d", path)}
    classes = {type_before_parametrizations(dun.get_submodule(path)) for path in taken} - LISTS
    for path, parameters, kind in _rest(dun, covered):
        new = {id(parameter): parameter.numel() for parameter in parameters if id(parameter) not in seen}
        seen |= new.keys()
        size = sum(new.values())
        if size and kind is not None and (_pattern(path) in patterns or kind in classes):
            listed.append(NotTaken((path,), size, "like a stage, but of another shape"))
        elif size > least:
            listed.append(NotTaken((path,), size, "outside the stages"))
    return tuple(listed)


def _is_outermost(dun: nn.Module, item: NotTaken, taken: set[str]) -> bool:
    """Whether what repeats is beside the stages, and not inside one or inside another module without stages."""
    for path in item.modules:
        parents = [path[:end] for end in range(len(path)) if path[end] == "."]
        beside = [p for p in parents if not isinstance(dun.get_submodule(p), (nn.ModuleList, nn.ModuleDict))]
        if path in taken or not all(any(other.startswith(parent + ".") for other in taken) for parent in beside):
            return False
    return True


def _rest(dun: nn.Module, covered: set[str]) -> Iterator[tuple[str, list[nn.Parameter], type[nn.Module] | None]]:
    """What is outside ``covered``: the outermost modules, with their classes, and the parameters beside these."""
    pending: list[tuple[str, nn.Module]] = [("", dun)]
    while pending:
        prefix, module = pending.pop(0)
        yield from ((prefix + name, [p], None) for name, p in module._parameters.items() if p is not None)
        for name, child in module._modules.items():
            path = prefix + name
            if child is None or path in covered:
                continue
            if any(other.startswith(path + ".") for other in covered):
                pending.append((path + ".", child))
            else:
                yield path, list(child.parameters()), type_before_parametrizations(child)


def _pattern(path: str) -> str:
    return re.sub(r"\d+", "#", path)

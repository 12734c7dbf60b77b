"""Stages that the user names: patterns, lists of modules, and numbers of calls."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import cast

from torch import nn

from ..errors import LoRunError
from ..util.numbers import is_whole_number
from .stage_map import abridged


def named_stages(dun: nn.Module, stages: str | Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the module paths of each group that ``stages``, an argument of ``find_stages``, names.

    Raises:
        LoRunError: a pattern or name that matches no module.

    >>> dun = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)))
    >>> named_stages(dun, "*.0"), named_stages(dun, ["0", "1"])
    ([['0.0', '1.0']], [['0', '1']])
    """
    if isinstance(stages, str):
        return [_matching(dun, stages)]
    if not all(isinstance(item, str) for item in stages):
        return [[path for name in item for path in _matching(dun, name)] for item in stages]
    items = cast("Sequence[str]", stages)
    patterns = [item for item in items if _is_pattern(item)]
    names = [path for item in items if not _is_pattern(item) for path in _matching(dun, item)]
    return [_matching(dun, pattern) for pattern in patterns] + ([names] if names else [])


def declared_calls(dun: nn.Module, calls: Mapping[str, int] | None) -> dict[str, int]:
    """Check ``calls``, an argument of ``find_stages``, and return it; empty for None.

    Raises:
        LoRunError: a name of no module, or fewer than two calls.
    """
    for name, count in (calls or {}).items():
        _check_module(dun, name, "calls=")
        if not is_whole_number(count, least=2):
            raise LoRunError(
                f"expected two or more calls of {name!r} in calls=, found {count!r}: count its calls in one forward"
            )
    return dict(calls or {})


def _is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[")


def _matching(dun: nn.Module, pattern: str) -> list[str]:
    """The paths of the modules that match a name or a pattern, in which ``*`` stands for one part of a path."""
    if not _is_pattern(pattern):
        _check_module(dun, pattern, "stages=")
        return [pattern]
    paths = [path for path, _ in dun.named_modules(remove_duplicate=False) if path and _matches(path, pattern)]
    if not paths:
        raise LoRunError(f"no module of {type(dun).__name__} matches {pattern!r}: {_modules_of(dun)}")
    return paths


def _matches(path: str, pattern: str) -> bool:
    parts, patterns = path.split("."), pattern.split(".")
    return len(parts) == len(patterns) and all(map(fnmatch.fnmatchcase, parts, patterns))


def _check_module(dun: nn.Module, name: str, where: str) -> None:
    try:
        dun.get_submodule(name)
    except AttributeError:
        raise LoRunError(f"{type(dun).__name__} has no module {name!r}, given in {where}: {_modules_of(dun)}") from None


def _modules_of(dun: nn.Module) -> str:
    names = tuple(name for name, _ in dun.named_children())
    return f"its modules are {abridged(names)}" if names else "it has none"

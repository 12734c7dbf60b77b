"""."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..disk.folder import as_path
from ..errors import LoRunError
from ..files.layout import ADAPTERS_FOLDER, OUTSIDE_FILE, PEFT_CONFIG_FILE, SET_CONFIG_FILE, TENSORS_FILE
from ..files.saved import chosen_set, stage_folder
from ..stages.stage_map import StageMap


def local(
    source: str | os.PathLike[str], needed: Callable[[Mapping[str, Any] | None, str], Iterable[str]], **hub: Any
) -> Path:
    """The folder, or file, that ``source`` is, or that of its repository in the Hub's cache, with the files needed."""
    from .repository import Repository

    if is_repository(source):
        return Repository(os.fspath(source), **hub).fetch(needed)
    if given := [option for option, value in hub.items() if value]:
        raise LoRunError(
            f"expected a repository as 'user/name' with {' and '.join(given)}, found {os.fspath(source)!r}: leave them "
            "out for a folder"
        )
    return as_path(source)


def _needed(
    stage_map: StageMap, description: Mapping[str, Any] | None, key: str, name: str, stage: int | None
) -> list[str]:
    """The files of a set, or of one of its stages, in a repository."""
    parts = [stage_folder(stage_map, g, s) for g in stage_map.groups for s in g.sites if stage in (None, s.stage)]
    if description is None:
        single = stage is not None and len(parts) == 1
        return [
            f"{part}/{file}".lstrip("/")
            for part in ([""] if single else parts)
            for file in (PEFT_CONFIG_FILE, TENSORS_FILE)
        ]
    key = key or f"{ADAPTERS_FOLDER}/{chosen_set(description, name, 'the repository')}"
    whole = {f"{key}/{part}" for part in parts}
    if stage is not None:  # where key is the folder of a stage with several denoisers
        whole |= {f"{key}/{group.name}" for group in stage_map.groups}
    beside = (
        (OUTSIDE_FILE, SET_CONFIG_FILE) if stage is None else (PEFT_CONFIG_FILE, TENSORS_FILE)
    )  # where key is a stage's own folder
    return [
        file
        for file in description["files"]
        if os.path.dirname(file) in whole or file in {f"{key}/{name}" for name in beside}
    ]


def is_repository(source: object) -> bool:
    """Whether a source names a repository of the Hub, as ``user/name``, and no folder that is there."""
    return (
        isinstance(source, str)
        and re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", source, re.ASCII) is not None
        and not os.path.exists(source)
    )

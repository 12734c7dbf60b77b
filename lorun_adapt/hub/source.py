"""Resolve a source, a folder on disk or a repository of the Hub, to a local path."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..disk.folder import as_path
from ..errors import LoRunError
from ..files.layout import (
    ADAPTERS_FOLDER,
    CARD_FILE,
    CONFIG_FILE,
    OUTSIDE_FILE,
    PEFT_CONFIG_FILE,
    SET_CONFIG_FILE,
    TENSORS_FILE,
)
from ..files.load import check_has_base
from ..files.saved import select_set, stage_folder
from ..stages.stage_map import StageMap

if TYPE_CHECKING:
    from .repository import FilesNeeded


def resolve_source(source: str | os.PathLike[str], needed: FilesNeeded, **hub: Any) -> Path:
    """Return the local path of ``source``; download a repository's files to the Hub's cache first.

    Args:
        source: a path, or a repository of the Hub as ``user/name``.
        needed: selects the files of a repository to download.
        hub: options of the repository: revision, subfolder, token, cache_dir, local_files_only.

    Raises:
        LoRunError: not a path; options of a repository given for a folder; as :meth:`Repository.fetch`.
    """
    if is_repository(source):
        from .repository import Repository  # imported here, since huggingface_hub imports slowly

        return Repository(os.fspath(source), **hub).fetch(needed)
    if given := [option for option, value in hub.items() if value]:
        raise LoRunError(
            f"expected a repository as 'user/name' with {' and '.join(given)}, found {os.fspath(source)!r}: leave "
            f"{'it' if len(given) == 1 else 'them'} out for a folder"
        )
    return as_path(source)


def is_repository(source: object) -> bool:
    """Whether a source is a repository of the Hub, as ``user/name``, and not an existing folder.

    >>> from lorun_adapt.hub.source import is_repository
    >>> is_repository("user/name"), is_repository("./saved/net")
    (True, False)
    """
    return (
        isinstance(source, str)
        and re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", source, re.ASCII) is not None
        and not os.path.exists(source)
    )


def files_of_conversion(description: Mapping[str, Any] | None, key: str) -> list[str]:
    """Return the files of a repository that a complete conversion needs: all except the cards.

    Raises:
        LoRunError: a repository without a conversion, or one with adapters but no base.
    """
    if description is None or key:
        place = f"{key!r}, which has only adapters" if key else f"a repository without {CONFIG_FILE}"
        raise LoRunError(f"cannot load a conversion from {place}: load its base first, then this with load_adapter")
    check_has_base(description, "the repository")
    return [name for name in description["files"] if os.path.basename(name) != CARD_FILE]


def files_of_set(stage_map: StageMap, name: str, stage: int | None) -> FilesNeeded:
    """Return a function that selects the files of a set, or of one stage, in a repository.

    Args:
        stage_map: the stages of the network.
        name: the set to load if there are several.
        stage: load only this stage.
    """
    parts = [stage_folder(stage_map, g, s) for g in stage_map.groups for s in g.sites if stage in (None, s.stage)]

    def needed(description: Mapping[str, Any] | None, key: str) -> list[str]:
        if description is None:
            places = [""] if stage is not None and len(parts) == 1 else parts
            return [f"{part}/{file}".lstrip("/") for part in places for file in (PEFT_CONFIG_FILE, TENSORS_FILE)]
        key = key or f"{ADAPTERS_FOLDER}/{select_set(description, name, 'the repository')}"
        whole = {f"{key}/{part}" for part in parts}
        if stage is None:
            beside = (OUTSIDE_FILE, SET_CONFIG_FILE)
        else:  # key may be the folder of a stage, whose denoisers may have subfolders
            whole |= {f"{key}/{group.name}" for group in stage_map.groups}
            beside = (PEFT_CONFIG_FILE, TENSORS_FILE)
        single = {f"{key}/{file}" for file in beside}
        return [file for file in description["files"] if os.path.dirname(file) in whole or file in single]

    return needed

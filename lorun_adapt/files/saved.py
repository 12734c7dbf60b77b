"""A saved folder, and its files with the hashes that its description has."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..disk.reading import read_file
from ..errors import LoRunError
from ..stages.stage_map import Group, Site, StageMap, stage_key
from .layout import CONFIG_FILE

BASE_KEY = "lorun_base"  # the fingerprint of the base, in the metadata of a safetensors file


def stage_folder(stage_map: StageMap, group: Group, site: Site) -> str:
    """Where in a set's folder the adapter of a denoiser is."""
    stage = stage_key(site.stage)
    return stage if len(stage_map.groups) == 1 else f"{stage}/{group.name}"


@dataclass(frozen=True)
class SavedFolder:
    """A folder to read from.

    Attributes:
        folder: where it is.
        description: its ``lorun_config.json``, which has the files' hashes; None where there is none.
        real_folders: folders within it that are known to be no links.
    """

    folder: Path
    description: Mapping[str, Any] | None
    real_folders: set[str] = field(default_factory=set)

    def content(self, name: str, limit: int) -> bytes:
        """The bytes of a file, at most ``limit``.

        Raises:
            LoRunError: a file that is missing, too large, leads out of the folder, or has another hash.
        """
        known = self.description["files"].get(name) if self.description is not None else None
        if self.description is not None and known is None:
            raise LoRunError(
                f"{self.folder / CONFIG_FILE} has no hash of {name!r}: the file was added later, or the folder is "
                "damaged; download it again"
            )
        content = read_file(self.folder, name, limit, self.real_folders)
        if known is not None and hashlib.sha256(content).hexdigest() != known:
            raise LoRunError(f"{self.folder / name} was changed after it was saved (another hash): download it again")
        return content

    def holds(self, name: str) -> bool:
        """Whether there is such a file: one that the description lists, if there is a description."""
        if self.description is None:
            return os.path.lexists(self.folder / name)
        return name in self.description["files"]

    def folders(self, key: str) -> list[str]:
        """The names of the folders in ``key``."""
        try:
            with os.scandir(os.path.join(self.folder, key)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir())
        except OSError:
            return []


def check_base(expected: str, found: str, where: str) -> None:
    """Refuse adapters for another base.

    Args:
        expected, found: fingerprints of the base in memory, and of the one that the file names.

    Raises:
        LoRunError: they differ.
    """
    if expected != found:
        raise LoRunError(
            f"expected an adapter for the base {expected[:12]}, found one for {found[:12]} in {where}: load the base "
            "that it was trained on with from_pretrained"
        )


def chosen_set(description: Mapping[str, Any], name: str, where: object) -> str:
    """The set to load as ``name`` from a saved conversion: the one of that name, or its only one.

    Raises:
        LoRunError: several sets, and none of that name.
    """
    names = description["adapters"]
    if name in names or len(names) == 1:
        return name if name in names else names[0]
    raise LoRunError(f"{where} has several adapter sets and no {name!r}: give the folder of one of {names}")

"""A saved folder, and reading its files with their hashes checked."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..disk.folder import sha256
from ..disk.reading import read_file
from ..errors import LoRunError
from ..stages.stage_map import Group, Site, StageMap, stage_key
from .layout import CARD_FILE, CONFIG_FILE

BASE_KEY = "lorun_base"  # the fingerprint of the base, in the metadata of a safetensors file


def stage_folder(stage_map: StageMap, group: Group, site: Site) -> str:
    """Return the folder of a denoiser's adapter, relative to the folder of its set."""
    stage = stage_key(site.stage)
    return stage if len(stage_map.groups) == 1 else f"{stage}/{group.name}"


@dataclass(frozen=True)
class SavedFolder:
    """A folder to read from.

    Attributes:
        folder: its path.
        description: its ``lorun_config.json`` with the hashes of the files; None if it has none.
        real_folders: subfolders already checked not to be links.
    """

    folder: Path
    description: Mapping[str, Any] | None
    real_folders: set[str] = field(default_factory=set)

    def content(self, name: str, limit: int) -> bytes:
        """Return the bytes of a file.

        Args:
            name: its path in the folder.
            limit: the maximum number of bytes.

        Raises:
            LoRunError: a file that is missing, is too large, links out of the folder, or has the wrong hash.
        """
        known = self.description["files"].get(name) if self.description is not None else None
        if self.description is not None and known is None:
            raise LoRunError(
                f"{self.folder / CONFIG_FILE} has no hash of {name!r}, so the file was added later or the folder is "
                "damaged: download it again"
            )
        content = read_file(self.folder, name, limit, self.real_folders)
        if known is not None and hashlib.sha256(content).hexdigest() != known:
            raise LoRunError(f"{self.folder / name} has the wrong hash, so it is damaged or changed: download it again")
        return content

    def holds(self, name: str) -> bool:
        """Whether the folder has a file; with a description, only the files it lists count."""
        if self.description is None:
            return os.path.lexists(self.folder / name)
        return name in self.description["files"]

    def stage_folders(self, key: str) -> list[str]:
        """Return the names of the folders of stages in the subfolder ``key``."""
        try:
            with os.scandir(os.path.join(self.folder, key)) as entries:
                names = sorted(entry.name for entry in entries if entry.is_dir())
                return [name for name in names if re.fullmatch(r"stage_\d+", name)]
        except OSError:
            return []


def check_base(expected: str, found: str, where: str) -> None:
    """Raise an error if an adapter is for another base.

    Args:
        expected: the fingerprint of the base in memory.
        found: the fingerprint of the base that a file names.
        where: the file, for the error message.

    Raises:
        LoRunError: the fingerprints differ.
    """
    if expected != found:
        raise LoRunError(
            f"expected an adapter for the base {expected[:12]}, found one for {found[:12]} in {where}: load the base "
            "that it was trained on with from_pretrained, or convert the same weights with share=False if it has none"
        )


def edited_cards(folder: Path, description: Mapping[str, Any]) -> list[str]:
    """Return the cards that someone has edited since they were written, by their paths in a saved folder."""
    cards = [name for name in description["files"] if Path(name).name == CARD_FILE and (folder / name).is_file()]
    return [name for name in cards if sha256(folder / name) != description["files"][name]]


def select_set(description: Mapping[str, Any], name: str, where: object) -> str:
    """Return the set to load from a saved conversion: the set ``name``, or its only set.

    Raises:
        LoRunError: several sets, none of them called ``name``.
    """
    names = description["adapters"]
    if name in names or len(names) == 1:
        return name if name in names else names[0]
    raise LoRunError(f"{where} has several adapter sets but no {name!r}: give the folder of one of {names}")

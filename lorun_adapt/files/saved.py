"""."""

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
    stage = stage_key(site.stage)
    return stage if len(stage_map.groups) == 1 else f"{stage}/{group.name}"


@dataclass(frozen=True)
class SavedFolder:
    """A folder to read from, and the description that has its files' hashes, if there is one."""

    folder: Path
    description: Mapping[str, Any] | None
    without_links: set[str] = field(default_factory=set)  # folders within it known not to be links

    def content(self, name: str, limit: int) -> bytes:
        known = self.description["files"].get(name) if self.description is not None else None
        if self.description is not None and known is None:
            raise LoRunError(
                f"expected a hash of {name!r}, found none in {self.folder / CONFIG_FILE}: it was put there later, or "
                "the folder is damaged; download it again"
            )
        content = read_file(self.folder, name, limit, self.without_links)
        if known is not None and hashlib.sha256(content).hexdigest() != known:
            raise LoRunError(f"expected {self.folder / name} as it was saved, found another hash: download it again")
        return content

    def holds(self, name: str) -> bool:
        """Whether there is such a file, as far as the description knows."""
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


def other_base(held: str, found: str, where: str) -> LoRunError:
    return LoRunError(
        f"expected an adapter for the base {held[:12]}, found one for {found[:12]} in {where}: load the base that it "
        "was trained on with from_pretrained"
    )


def chosen_set(description: Mapping[str, Any], name: str, where: object) -> str:
    names = description["adapters"]
    if name in names or len(names) == 1:
        return name if name in names else names[0]
    raise LoRunError(f"expected one adapter set or {name!r} in {where}, found {names}: give the folder of a set")

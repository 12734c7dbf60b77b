"""Read adapter sets, or the adapter of one stage, from folders that this package or PEFT wrote."""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from torch import Tensor, nn

from ..disk.folder import retry_if_replaced
from ..disk.reading import Slot, file_limit, parse_tensors
from ..errors import LoRunError
from ..network.adapter import StageAdapter
from ..network.converted import AdapterInfo, AdapterSet
from ..peft_format.reader import Reader, readers_of
from ..stages.stage_map import Site, StageMap, stage_key
from ..stages.tensors import outside_parameters
from ..util.modules import has_valid_values
from ..util.numbers import is_index
from .adapter_info import MAX_INFO_BYTES, read_adapter_info
from .description import description_bytes, groups_of, parse_description, stage_map_of
from .layout import ADAPTERS_FOLDER, CONFIG_FILE, OUTSIDE_FILE, PEFT_CONFIG_FILE, SET_CONFIG_FILE, TENSORS_FILE
from .saved import BASE_KEY, SavedFolder, check_base, select_set, stage_folder

MAX_DESCRIPTIONS = 4  # in the cache


def check_stage(stage: object, num_stages: int) -> None:
    """Raise an error unless ``stage`` is the number of a stage, or None for all stages.

    Raises:
        LoRunError: not a whole number in 0..num_stages - 1.
    """
    if stage is not None:
        if not is_index(stage) or int(stage) not in range(num_stages):
            raise LoRunError(f"expected a stage in 0..{num_stages - 1}, found {stage!r}: see print(lorun.stage_map)")


class SetReader:
    """Reads adapter sets for one base, and caches what their files have in common.

    Args:
        base: the base; its tensors are read when a set is loaded, and never changed.
        stage_map: the positions of its stages.
        fingerprint: the hash of the base.
    """

    def __init__(self, base: nn.Module, stage_map: StageMap, fingerprint: str) -> None:
        self.base, self.stage_map, self.fingerprint = base, stage_map, fingerprint
        self._readers: dict[tuple[str, str], Reader] = {}
        self._descriptions: dict[bytes, dict[str, Any]] = {}  # those already checked to be for this base

    def load(self, path: Path, name: str, stage: int | None = None) -> AdapterSet:
        """Load a set, or, with ``stage``, the adapter of one stage.

        Args:
            path: a saved folder, the folder of a set or of a stage, or the safetensors file of a stage.
            name: the set to load if a saved folder has several.
            stage: load only this stage.

        Raises:
            LoRunError: files that are missing, damaged, or for another base.
        """
        return retry_if_replaced(path, lambda: self._load(path, name, stage))

    def _load(self, path: Path, name: str, stage: int | None) -> AdapterSet:
        stage_map, file = self.stage_map, TENSORS_FILE
        if path.suffix == ".safetensors" and os.path.isfile(path):
            path, file = path.parent, path.name
            named = re.fullmatch(r"stage_(\d+)", path.name)
            stage = int(named[1]) if stage is None and named else stage
            if stage not in range(len(stage_map)) or len(stage_map.groups) > 1:
                raise LoRunError(
                    f"cannot tell which stage {path / file} is for: give stage=, or, if a stage has several denoisers, "
                    "the folder of the stage"
                )
        if not os.path.isdir(path):
            raise LoRunError(
                f"no folder at {path}: give a saved folder, the folder of a set, or a repository of the Hub as "
                "user/name"
            )
        saved, key = self._locate(path)
        if saved.description is not None and key == "":
            key = f"{ADAPTERS_FOLDER}/{select_set(saved.description, name, path)}"
        if stage is None:
            return self.read_set(saved, key)
        if os.path.isdir(saved.folder / key / stage_key(stage)):
            key = f"{key}/{stage_key(stage)}".lstrip("/")
        elif held := saved.stage_folders(key):
            raise LoRunError(
                f"{saved.folder / key} has no adapter for stage {stage}, only {', '.join(held)}: choose one of these"
            )
        several = len(stage_map.groups) > 1
        read: dict[str, tuple[StageAdapter, LoraConfig]] = {}
        for group in stage_map.groups:
            for site in group.sites:
                if site.stage == stage:
                    part = f"{key}/{group.name}".lstrip("/") if several else key
                    read[group.name] = self._read_adapter(saved, part, group.name, site, file)
        return AdapterSet({stage: {name: adapter for name, (adapter, _) in read.items()}}, _copy_first_config([read]))

    def read_set(self, saved: SavedFolder, key: str) -> AdapterSet:
        """Read the set in the subfolder ``key``. It may lack stages, but each of its stages must be complete.

        Raises:
            LoRunError: as :meth:`load`.
        """
        stage_map = self.stage_map
        parts = {stage_folder(stage_map, g, s): (g, s) for g in stage_map.groups for s in g.sites}
        stages = {part.partition("/")[0] for part in parts}
        extra = [name for name in saved.stage_folders(key) if name not in stages]
        if extra:
            raise LoRunError(
                f"expected {len(stage_map)} stages, found {extra[-1]} in {saved.folder / key}: load it on the "
                "network that it was made for"
            )
        if saved.description is not None:
            depth = len(key.split("/"))
            held = {name.split("/")[depth] for name in saved.description["files"] if name.startswith(f"{key}/stage_")}
        else:
            held = {stage for stage in stages if os.path.isdir(saved.folder / key / stage)}
        if not held & stages:
            raise LoRunError(
                f"no adapters for the {len(stage_map)} stages in {saved.folder / key}: give the folder of a set, or "
                "pass stage= for the adapter of one stage"
            )
        read: dict[int, dict[str, tuple[StageAdapter, LoraConfig]]] = {}
        for part, (group, site) in parts.items():
            if part.partition("/")[0] in held:
                place = f"{key}/{part}".lstrip("/")
                read.setdefault(site.stage, {})[group.name] = self._read_adapter(saved, place, group.name, site)
        outside, info = (f"{key}/{name}".lstrip("/") for name in (OUTSIDE_FILE, SET_CONFIG_FILE))
        return AdapterSet(
            {stage: {name: adapter for name, (adapter, _) in read[stage].items()} for stage in sorted(read)},
            _copy_first_config(read.values()),
            self._read_outside(saved, outside) if saved.holds(outside) else {},
            read_adapter_info(saved.content(info, MAX_INFO_BYTES), len(stage_map), str(saved.folder / info))
            if saved.holds(info)
            else AdapterInfo(),
        )

    def _locate(self, path: Path) -> tuple[SavedFolder, str]:
        """Return the saved folder that contains ``path`` and lists it in its description, and the path inside it."""
        try:
            path = Path(os.path.abspath(path))
        except OSError as error:
            raise LoRunError(
                f"cannot resolve {path}: the current directory no longer exists; change to an existing folder"
            ) from error
        for root in (path, *path.parents[1:4]):  # adapters/<set>, adapters/<set>/stage_00, or a denoiser's folder in it
            key = "" if root == path else path.relative_to(root).as_posix()
            may_be_within = f"{key}/".startswith(("/", f"{ADAPTERS_FOLDER}/"))
            if not may_be_within or not os.path.lexists(os.path.join(root, CONFIG_FILE)):
                continue
            content = description_bytes(root, self.stage_map.num_tensors)
            known = self._descriptions.get(content)
            description = known or parse_description(content, root / CONFIG_FILE)
            if key and not any(name.startswith(f"{key}/") for name in description["files"]):
                break  # someone put this folder there later
            if known is None:
                self._check_fits(description, root / CONFIG_FILE)
                if len(self._descriptions) >= MAX_DESCRIPTIONS:
                    self._descriptions.clear()
                self._descriptions[content] = description
            return SavedFolder(root, description), key
        return SavedFolder(path, None), ""

    def _check_fits(self, description: Mapping[str, Any], file: Path) -> None:
        """Raise an error if the adapters are for another base."""
        check_base(self.fingerprint, description["fingerprint"], str(file))
        alike = description["network"] == self.stage_map.network
        if not (alike and description["groups"] == groups_of(self.stage_map)):
            stage_map_of(self.base, description, file)  # its error says what does not fit
            raise LoRunError(f"{file} is for other stages: load the base that it was trained on with from_pretrained")

    def _read_outside(self, saved: SavedFolder, name: str) -> dict[str, Tensor]:
        """Read the parameters outside the stages that a set replaces; they must have the shapes of the base's."""
        places, where = outside_parameters(self.base, self.stage_map), str(saved.folder / name)
        slots = {name: Slot(tuple(tensor.shape), tensor.dtype) for name, tensor in places.items()}
        tensors, metadata = parse_tensors(saved.content(name, file_limit(slots)), slots, where)
        check_base(self.fingerprint, metadata.get(BASE_KEY, self.fingerprint), where)
        outside = {name: tensor.to(places[name]) for name, tensor in tensors.items()}
        if invalid := [name for name, tensor in outside.items() if not has_valid_values(tensor, False)]:
            raise LoRunError(
                f"{invalid[0]!r} has NaN or Inf in {where}: download it again, or save weights from before training "
                "diverged"
            )
        return outside

    def _read_adapter(
        self, saved: SavedFolder, key: str, group_name: str, site: Site, file: str = TENSORS_FILE
    ) -> tuple[StageAdapter, LoraConfig]:
        self._readers = self._readers or readers_of(self.base, self.stage_map)
        reader = self._readers[group_name, site.module]
        names = [f"{key}/{name}".lstrip("/") for name in (PEFT_CONFIG_FILE, file)]
        where = [f"{saved.folder}{os.sep}{name}" for name in names]
        pickle = where[1].removesuffix(file) + "adapter_model.bin"
        if not os.path.exists(where[1]) and os.path.exists(pickle):
            raise LoRunError(
                f"expected {TENSORS_FILE}, found a pickle at {pickle}: pickles can run code and are never read; save "
                "the adapter with safe_serialization=True"
            )
        config = saved.content(names[0], 65_536 + 600 * len(reader.slots))
        adapter, lora_config, metadata = reader.read(config, saved.content(names[1], reader.num_bytes), site, where)
        check_base(self.fingerprint, metadata.get(BASE_KEY, self.fingerprint), where[1])
        return adapter, lora_config


def _copy_first_config(read: Any) -> LoraConfig:
    """Return a copy of the first adapter's config; the reader keeps the original in its cache."""
    config = copy.copy(next(config for stage in read for _, config in stage.values()))
    for name, value in vars(config).items():
        if isinstance(value, (dict, list, set)):
            setattr(config, name, value.copy())
    return config

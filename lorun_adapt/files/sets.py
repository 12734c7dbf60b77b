"""Adapters in folders: a set, or one stage's, from a saved conversion or from PEFT.

    adapters/<set>/stage_00/adapter_config.json      a PEFT LoraConfig
    adapters/<set>/stage_00/adapter_model.safetensors
    adapters/<set>/outside.safetensors               parameters outside the stages, where a set has some
    adapters/<set>/set_config.json                   its noise and its quality, where these are known

A stage of several denoisers has a subfolder for each.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from torch import Tensor

from ..disk.folder import retry_if_replaced
from ..disk.reading import Slot, file_limit, parse_tensors
from ..errors import LoRunError
from ..hub.source import _needed, local
from ..network.adapter import StageAdapter
from ..network.converted import AdapterInfo, AdapterSet
from ..peft_format.reader import Reader
from ..stages.stage_map import Site, StageMap, stage_key
from ..stages.tensors import outside_parameters
from ..util.modules import has_valid_values
from .adapter_info import LONGEST, read_adapter_info
from .description import description_bytes, groups_of, parse_description, stage_map_of
from .layout import ADAPTERS_FOLDER, CONFIG_FILE, OUTSIDE_FILE, PEFT_CONFIG_FILE, SET_CONFIG_FILE, TENSORS_FILE
from .saved import BASE_KEY, SavedFolder, chosen_set, other_base, stage_folder

if TYPE_CHECKING:
    from torch import nn

    from ..model.adapter_sets import AdapterSets

MOST_KNOWN = 4  # descriptions that are kept


def load_set(
    lorun: AdapterSets, source: str | os.PathLike[str], name: str, stage: int | None, **hub: Any
) -> AdapterSet:
    """What :meth:`LoRunModel.load_adapter` reads."""
    if stage is not None and (
        not hasattr(stage, "__index__") or int(stage) not in range(len(lorun.stage_map)) or isinstance(stage, bool)
    ):
        raise LoRunError(
            f"expected a stage in 0..{len(lorun.stage_map) - 1}, found {stage!r}: see print(lorun.stage_map)"
        )
    path = local(source, lambda description, key: _needed(lorun.stage_map, description, key, name, stage), **hub)
    return retry_if_replaced(path, lambda: _load_set(lorun, path, name, stage))


def _load_set(lorun: AdapterSets, path: Path, name: str, stage: int | None) -> AdapterSet:
    stage_map, fingerprint = lorun.stage_map, lorun.fingerprint
    file = TENSORS_FILE
    if path.suffix == ".safetensors" and os.path.isfile(path):
        path, file = path.parent, path.name
        named = re.fullmatch(r"stage_(\d+)", path.name)
        stage = int(named[1]) if stage is None and named else stage
        if stage not in range(len(stage_map)) or len(stage_map.groups) > 1:
            raise LoRunError(
                f"expected a stage's adapter, found {path / file}, which does not say whose it is: give stage= or, "
                "where stages have several denoisers, the stage's folder"
            )
    if not os.path.isdir(path):
        raise LoRunError(f"expected a folder with an adapter, found none at {path}: give a saved folder or a set's")
    saved, key = _place_of(path, lorun, fingerprint)
    if saved.description is not None and key == "":
        key = f"{ADAPTERS_FOLDER}/{chosen_set(saved.description, name, path)}"
    if stage is None:
        return read_set(saved, key, lorun.readers, lorun.base, stage_map, fingerprint)
    if os.path.isdir(saved.folder / key / stage_key(stage)):
        key = f"{key}/{stage_key(stage)}".lstrip("/")
    found = {}
    for group in stage_map.groups:
        for site in group.sites:
            if site.stage == stage:
                part = f"{key}/{group.name}".lstrip("/") if len(stage_map.groups) > 1 else key
                reader = lorun.readers[group.name, site.module]
                found[group.name, site] = _read_adapter(saved, part, reader, site, fingerprint, file)
    return AdapterSet(*_together(found))


def _place_of(path: Path, lorun: AdapterSets, fingerprint: str) -> tuple[SavedFolder, str]:
    """The saved folder that ``path`` is or lies in, if it knows of it, and the place within."""
    try:
        path = Path(os.path.abspath(path))
    except OSError as error:
        raise LoRunError(
            f"expected a folder, found that the current one is gone for {path}: change to another"
        ) from error
    for root in (path, *path.parents[1:4]):  # adapters/<set>, adapters/<set>/stage_00, or a denoiser's folder in that
        key = "" if root == path else path.relative_to(root).as_posix()
        if not f"{key}/".startswith(("/", f"{ADAPTERS_FOLDER}/")) or not os.path.lexists(
            os.path.join(root, CONFIG_FILE)
        ):
            continue
        content = description_bytes(root, lorun.stage_map.num_tensors)
        known = lorun.descriptions.get(content)
        description = known or parse_description(content, root / CONFIG_FILE)
        if key and not any(name.startswith(f"{key}/") for name in description["files"]):
            break  # something that was put there later
        if known is None:
            _check_fits(description, root / CONFIG_FILE, lorun, fingerprint)
            if len(lorun.descriptions) >= MOST_KNOWN:
                lorun.descriptions.clear()
            lorun.descriptions[content] = description
        return SavedFolder(root, description), key
    return SavedFolder(path, None), ""


def _check_fits(description: Mapping[str, Any], file: Path, lorun: AdapterSets, fingerprint: str) -> None:
    """Refuse adapters for another base."""
    if description["fingerprint"] != fingerprint:
        raise other_base(fingerprint, description["fingerprint"], str(file))
    alike = description["network"] == lorun.stage_map.network
    if not (alike and description["groups"] == groups_of(lorun.stage_map)):
        stage_map_of(lorun.base, description, file)  # says what does not fit
        raise LoRunError(
            f"expected the stages of this network, found others in {file}: load the base that it was trained on with "
            "from_pretrained"
        )


def read_set(
    saved: SavedFolder,
    key: str,
    readers: Mapping[tuple[str, str], Reader],
    base: nn.Module,
    stage_map: StageMap,
    fingerprint: str,
) -> AdapterSet:
    """The set in the folder ``key``, which may hold some stages only, but those whole."""
    parts = {stage_folder(stage_map, g, s): (g, s) for g in stage_map.groups for s in g.sites}
    stages = {part.partition("/")[0] for part in parts}
    extra = [name for name in saved.folders(key) if re.fullmatch(r"stage_\d+", name) and name not in stages]
    if extra:
        raise LoRunError(
            f"expected {len(stage_map)} stages, found {extra[-1]} in {saved.folder / key}: it is for another network"
        )
    if saved.description is not None:
        depth = len(key.split("/"))
        held = {name.split("/")[depth] for name in saved.description["files"] if name.startswith(f"{key}/stage_")}
    else:
        held = {stage for stage in stages if os.path.isdir(saved.folder / key / stage)}
    if not held & stages:
        raise LoRunError(
            f"expected adapters for {len(stage_map)} stages in {saved.folder / key}, found none: give a set's folder, "
            "or say with stage= whose adapter it is"
        )
    found = {}
    for part, (group, site) in parts.items():
        if part.partition("/")[0] in held:
            place = f"{key}/{part}".lstrip("/")
            found[group.name, site] = _read_adapter(saved, place, readers[group.name, site.module], site, fingerprint)
    outside, about = (f"{key}/{name}".lstrip("/") for name in (OUTSIDE_FILE, SET_CONFIG_FILE))
    return AdapterSet(
        *_together(found),
        _read_outside(saved, outside, base, stage_map, fingerprint) if saved.holds(outside) else {},
        read_adapter_info(saved.content(about, LONGEST), len(stage_map), str(saved.folder / about))
        if saved.holds(about)
        else AdapterInfo(),
    )


def _together(
    found: Mapping[tuple[str, Site], tuple[StageAdapter, LoraConfig]],
) -> tuple[dict[tuple[str, Site], StageAdapter], LoraConfig]:
    config = copy.copy(next(config for _, config in found.values()))  # it is kept for the next set that has it
    for name, value in vars(config).items():
        if isinstance(value, (dict, list, set)):
            setattr(config, name, value.copy())
    return {place: adapter for place, (adapter, _) in found.items()}, config


def _read_outside(
    saved: SavedFolder, name: str, base: nn.Module, stage_map: StageMap, fingerprint: str
) -> dict[str, Tensor]:
    """The parameters outside the stages that a file holds: some of the base's, in their shapes."""
    places, where = outside_parameters(base, stage_map), str(saved.folder / name)
    slots = {name: Slot(tuple(tensor.shape), tensor.dtype) for name, tensor in places.items()}
    tensors, about = parse_tensors(saved.content(name, file_limit(slots)), slots, where)
    if about.get(BASE_KEY, fingerprint) != fingerprint:
        raise other_base(fingerprint, about[BASE_KEY], where)
    found = {name: tensor.to(places[name]) for name, tensor in tensors.items()}
    if unsound := [name for name, tensor in found.items() if not has_valid_values(tensor, False)]:
        raise LoRunError(
            f"expected finite numbers in {unsound[0]!r}, found NaN or Inf in {where}: download it again, or save one "
            "from before training diverged"
        )
    return found


def _read_adapter(
    saved: SavedFolder, key: str, reader: Reader, site: Site, fingerprint: str, file: str = TENSORS_FILE
) -> tuple[StageAdapter, LoraConfig]:
    names = [f"{key}/{name}".lstrip("/") for name in (PEFT_CONFIG_FILE, file)]
    where = [f"{saved.folder}{os.sep}{name}" for name in names]
    pickle = where[1].removesuffix(file) + "adapter_model.bin"
    if not os.path.exists(where[1]) and os.path.exists(pickle):
        raise LoRunError(
            f"expected {TENSORS_FILE}, found a pickle at {pickle}: pickles can run code and are never read; save the "
            "adapter with safe_serialization=True"
        )
    config = saved.content(names[0], 65_536 + 600 * len(reader.slots))
    adapter, told, about = reader.read(config, saved.content(names[1], reader.num_bytes), site, where)
    if about.get(BASE_KEY, fingerprint) != fingerprint:
        raise other_base(fingerprint, about[BASE_KEY], where[1])
    return adapter, told

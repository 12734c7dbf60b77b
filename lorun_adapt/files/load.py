"""."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..disk.reading import DTYPES, Slot, file_limit, parse_tensors
from ..errors import LoRunError
from ..network.adapter import lowrank_terms
from ..network.assemble import share
from ..network.converted import Card
from ..peft_format.reader import readers_of
from ..stages.checks import check_dense
from ..stages.stage_map import StageMap
from ..stages.tensors import base_tensors, stage_values
from ..util.modules import buffer_names as _buffers
from ..util.modules import copy_network, has_valid_values, tensors_of
from .description import read_description, stage_map_of
from .layout import ADAPTERS_FOLDER, BASE_FILE, CONFIG_FILE
from .saved import SavedFolder
from .sets import read_set

if TYPE_CHECKING:
    from ..model.lorun_model import LoRunModel


def stored_dtype(lorun: LoRunModel, path: Path) -> torch.dtype | None:
    """What the folder that ``lorun`` was loaded from stores its numbers as; None if they differ, or are as loaded."""
    found = set()
    for name in read_description(path, lorun.stage_map.num_tensors)["files"]:
        if name.endswith(Path(BASE_FILE).suffix):
            with safe_open(path / name, "pt") as file:
                found |= {DTYPES[file.get_slice(key).get_dtype()] for key in file.keys()}
    stored = {dtype for dtype in found if dtype.is_floating_point}
    loaded = {tensor.dtype for tensor in lorun.state_dict().values() if tensor.is_floating_point()}
    return stored.pop() if len(stored) == 1 and stored != loaded else None


def _check_base(description: Mapping[str, Any], where: object) -> None:
    if BASE_FILE not in description["files"]:
        raise LoRunError(
            f"expected a conversion with its base, found adapters alone in {where}: load the base "
            f"{str(description.get('fingerprint'))[:12]} that they name, and these with load_adapter"
        )


def _load(folder: Path, dun: nn.Module) -> LoRunModel:
    from ..model.lorun_model import LoRunModel

    description = read_description(folder, len(tensors_of(dun)))
    _check_base(description, folder)
    stage_map = stage_map_of(dun, description, folder / CONFIG_FILE)
    check_dense(dun)
    saved = SavedFolder(folder, description)
    of_dun = {name: Slot(tuple(tensor.shape), tensor.dtype) for name, tensor, _ in tensors_of(dun)}
    content = saved.content(BASE_FILE, file_limit(of_dun))
    base = copy_network(dun)
    for group in stage_map.groups:
        firsts = {spec.name: stage_values(dun, group, spec)[0].clone() for spec in group.tensors}
        share(
            base, group, {s.name: firsts[s.name].zero_() if s.without_base else firsts[s.name] for s in group.tensors}
        )
    _fill_base(base, stage_map, content, folder / BASE_FILE)
    readers = readers_of(base, stage_map)
    sets = {
        name: read_set(saved, f"{ADAPTERS_FOLDER}/{name}", readers, base, stage_map, description["fingerprint"])
        for name in description["adapters"]
    }
    ranks: dict[str, dict[str, int]] = {}
    for (group_name, _), adapter in [pair for found in sets.values() for pair in found.adapters.items()]:
        ranks.setdefault(group_name, {name: term.rank for name, term in lowrank_terms(adapter).items()})
    return LoRunModel(
        base,
        dataclasses.replace(stage_map, ranks=ranks),
        sets,
        description["errors"],
        active=dict(enumerate(description["active"])),
        fingerprint=description["fingerprint"],
        card=Card(**description["card"]),
        trainable={name for name, p in dun.named_parameters() if p.requires_grad},
    )


def _fill_base(base: nn.Module, stage_map: StageMap, content: bytes, file: Path) -> None:
    places, buffers = base_tensors(base, stage_map), _buffers(base)
    slots = {name: Slot(tuple(tensor.shape), tensor.dtype) for name, tensor in places.items()}
    tensors, _ = parse_tensors(content, slots, str(file))
    for name, place in places.items():
        if name not in tensors:
            raise LoRunError(
                f"expected {name!r} of shape {tuple(place.shape)}, found nothing in {file}: build the network that was "
                "converted, or download the file again"
            )
        value = tensors[name].to(place)
        if not has_valid_values(value, name in buffers):
            raise LoRunError(
                f"expected finite numbers in {name!r}, found NaN or Inf in {file}: download it again, or save one from "
                "before training diverged"
            )
        if place.is_contiguous():
            with torch.no_grad():
                place.copy_(value)
        else:  # it may be expanded from fewer numbers
            for module in base.modules():
                for held in (module._buffers, module._parameters):
                    held.update({key: _like(value, place) for key, tensor in held.items() if tensor is place})


def _like(value: Tensor, place: Tensor) -> Tensor:
    return nn.Parameter(value, requires_grad=False) if isinstance(place, nn.Parameter) else value

"""Load a converted network from a saved folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from ..disk.eight_bits import SCALES
from ..disk.reading import DTYPES, Slot, file_limit, parse_tensors
from ..errors import LoRunError
from ..network.assemble import share_base
from ..network.converted import Card, Converted, ranks_in
from ..network.sharing import ties_of
from ..stages.checks import check_dense
from ..stages.stage_map import StageMap
from ..stages.tensors import base_tensors, stage_values
from ..util.copying import check_separate, copy_network
from ..util.modules import buffer_names, distinct_tensors, has_valid_values, tensors_of, trainable_names
from .description import FORMATS, read_description, stage_map_of
from .layout import ADAPTERS_FOLDER, BASE_FILE, CONFIG_FILE
from .saved import SavedFolder
from .sets import SetReader


def load(folder: Path, dun: nn.Module) -> Converted:
    """Load the conversion in ``folder``; see :func:`lorun_adapt.from_pretrained`.

    Args:
        folder: a saved folder.
        dun: a network of the converted class, with any weights; it is not changed.

    Raises:
        LoRunError: files that are missing, damaged, or for another network.
    """
    description = read_description(folder, len(tensors_of(dun)))
    check_has_base(description, folder)
    stage_map = stage_map_of(dun, description, folder / CONFIG_FILE)
    check_dense(dun)
    saved = SavedFolder(folder, description)
    slots = {name: Slot(tuple(tensor.shape), tensor.dtype) for name, tensor, _ in tensors_of(dun)}
    content = saved.content(BASE_FILE, file_limit(slots))
    base = copy_network(dun)
    check_separate(dun, base)
    for group in stage_map.groups if stage_map.shared else ():
        firsts = {spec.name: stage_values(dun, group, spec)[0].clone() for spec in group.tensors}
        values = {s.name: firsts[s.name].zero_() if s.without_base else firsts[s.name] for s in group.tensors}
        share_base(base, group, values)
    _fill_base(base, stage_map, content, folder / BASE_FILE)
    reader = SetReader(base, stage_map, description["fingerprint"])
    sets = {name: reader.read_set(saved, f"{ADAPTERS_FOLDER}/{name}") for name in description["adapters"]}
    return Converted(
        base,
        dataclasses.replace(stage_map, ranks=ranks_in(*sets.values())),
        sets,
        dict(enumerate(description["active"])),
        description["errors"],
        trainable_names=trainable_names(dun),
        card=Card(**description["card"]),
        ties=ties_of(dun),
        known_fingerprint=description["fingerprint"],
    )


def check_has_base(description: Mapping[str, Any], where: object) -> None:
    """Raise an error if a folder has adapters but no base.

    Args:
        description: the folder's description.
        where: the folder, for the error message.

    Raises:
        LoRunError: the description lists no base.
    """
    if BASE_FILE not in description["files"]:
        base = f"load their base {str(description.get('fingerprint'))[:12]} first"
        if description.get("format") == FORMATS[False]:
            base = "convert the original network with share=False first"
        raise LoRunError(f"{where} has adapters but no base: {base}, then load these adapters with load_adapter")


def stored_dtype(converted: Converted, path: Path) -> torch.dtype | None:
    """Return the dtype to save with, to get the same dtypes as in a folder; None if that needs none.

    It is the floating-point dtype of the folder's tensors, unless there are several, or it is that of the loaded ones;
    or ``torch.int8`` if the folder is in eight bits.

    Args:
        converted: the network loaded from ``path``.
        path: a saved folder.
    """
    dtypes = set()
    for name in read_description(path)["files"]:
        if name.endswith(Path(BASE_FILE).suffix):
            with safe_open(path / name, "pt") as file:
                if SCALES in file.keys():
                    return torch.int8
                dtypes |= {DTYPES[file.get_slice(key).get_dtype()] for key in file.keys()}
    stored = {dtype for dtype in dtypes if dtype.is_floating_point}
    modules = [converted.base]
    for held in converted.sets.values():
        modules += [adapter for adapters in held.adapters.values() for adapter in adapters.values()]
    tensors = [tensor for module in modules for tensor in distinct_tensors(module).values()]
    loaded = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return stored.pop() if len(stored) == 1 and stored != loaded else None


def _fill_base(base: nn.Module, stage_map: StageMap, content: bytes, file: Path) -> None:
    """Copy the tensors in ``content``, the bytes of a safetensors file, into ``base``."""
    places, buffers = base_tensors(base, stage_map), buffer_names(base)
    slots = {name: Slot(tuple(tensor.shape), tensor.dtype) for name, tensor in places.items()}
    tensors, _ = parse_tensors(content, slots, str(file))
    for name, place in places.items():
        if name not in tensors:
            raise LoRunError(
                f"{file} has no tensor {name!r} of shape {tuple(place.shape)}: build the network with the same sizes "
                "as the converted one, or download the file again"
            )
        value = tensors[name].to(place)
        if not has_valid_values(value, name in buffers):
            raise LoRunError(
                f"{name!r} has NaN or Inf in {file}: download it again, or save weights from before training diverged"
            )
        if place.is_contiguous():
            with torch.no_grad():
                place.copy_(value)
        else:  # the tensor may be expanded, so that several elements share memory
            new = nn.Parameter(value, requires_grad=False) if isinstance(place, nn.Parameter) else value
            for module in base.modules():
                for held in (module._buffers, module._parameters):
                    for key in [key for key, tensor in held.items() if tensor is place]:
                        setattr(module, key, new)

"""Write a converted network as a folder of safetensors and JSON files; ``layout.py`` lists them."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ..disk import eight_bits
from ..disk.folder import replace_folder, sha256
from ..disk.reading import DTYPES
from ..errors import LoRunError
from ..network.adapter import StageAdapter
from ..network.converted import AdapterInfo, AdapterSet, Converted
from ..network.eight_bits import as_floats
from ..peft_format import writer
from ..peft_format.limits import peft_view
from ..stages.stage_map import Group, StageMap
from ..stages.tensors import base_denoiser, base_tensors, outside_parameters
from ..util.modules import buffer_names, has_valid_values
from .adapter_info import adapter_info_text
from .card import model_card, set_card
from .description import as_text, describe, read_description
from .layout import (
    ADAPTERS_FOLDER,
    BASE_FILE,
    CARD_FILE,
    CONFIG_FILE,
    OUTSIDE_FILE,
    SET_CONFIG_FILE,
    TENSORS_FILE,
    TOP_LEVEL,
)
from .load import stored_dtype
from .saved import BASE_KEY, SavedFolder, edited_cards, stage_folder

EIGHT_BITS = "the tensors are stored in eight bits, which PEFT does not read"
MAX_BYTES = 1 << 40  # of a file that was loaded before, and so passed its own limit


def save(converted: Converted, path: Path, dtype: torch.dtype | None = None, adapters_only: bool = False) -> None:
    """Save a conversion; see :meth:`LoRunModel.save_pretrained`."""
    if dtype not in (None, torch.int8) and (dtype not in DTYPES.values() or not dtype.is_floating_point):
        raise LoRunError(
            f"expected a floating-point dtype or torch.int8 to save as, found {dtype}: use torch.float16, for example"
        )
    if adapters_only:
        check_keeps_base(path)
    metadata = {BASE_KEY: converted.fingerprint}  # a single entry, since safetensors does not keep the order of several
    base, eight = converted.base, dtype == torch.int8
    refused, floats = (EIGHT_BITS, None) if eight else (None, dtype)  # floats: what all floating-point numbers become

    def fill(folder: Path) -> None:
        if not adapters_only:
            tensors = base_tensors(base, converted.stage_map)
            outside = outside_parameters(base, converted.stage_map) if eight else ()
            _write_tensors(folder / BASE_FILE, tensors, dtype, metadata, buffer_names(base), outside)
        problems: dict[str, str] = {}
        for name, held in converted.sets.items():
            for part, group, adapter, denoisers in _adapters(converted, held):
                part = f"{ADAPTERS_FOLDER}/{name}/{part}"
                written = writer.write(*denoisers, group, adapter, floats, refused)
                if written.problem:
                    problems.setdefault(written.problem, part)
                (folder / part).mkdir(parents=True)
                buffers = {writer.PREFIX + spec.name for spec in group.tensors if spec.buffer}
                _write_tensors(folder / part / TENSORS_FILE, written.tensors, dtype, metadata, buffers, written.exact)
                written.config.save_pretrained(str(folder / part))
            if held.outside:
                _write_tensors(folder / ADAPTERS_FOLDER / name / OUTSIDE_FILE, held.outside, floats, metadata, ())
        _write_cards(converted, folder, problems, path)

    replace_folder(path, foreign_entries, CONFIG_FILE, fill)


def check_keeps_base(path: Path) -> None:
    """Raise an error if saving adapters alone to ``path`` would delete a base.

    Raises:
        LoRunError: ``path`` has a base.
    """
    if (path / BASE_FILE).is_file():
        raise LoRunError(f"saving only adapters to {path} would delete its {BASE_FILE}: choose another folder")


def update_cards(converted: Converted, path: Path) -> None:
    """Update the cards of a saved folder, and the noise level and quality of its sets; copy the tensors unchanged.

    Args:
        converted: the network loaded from ``path``, with new noise levels or qualities.
        path: a saved folder.

    Raises:
        LoRunError: the sets or the base in ``path`` have changed since it was loaded.
    """
    description = read_description(path)
    if description["adapters"] != list(converted.sets) or description["fingerprint"] != converted.fingerprint:
        raise LoRunError(f"{path} has changed since it was loaded: load it again")

    def fill(folder: Path) -> None:
        saved = SavedFolder(path, description)
        refused = EIGHT_BITS if stored_dtype(converted, path) == torch.int8 else None
        problems: dict[str, str] = {}
        for name, held in converted.sets.items():
            for part, group, adapter, denoisers in _adapters(converted, held):
                if problem := peft_view(*denoisers, group, adapter, refused).problem:
                    problems.setdefault(problem, f"{ADAPTERS_FOLDER}/{name}/{part}")
        for file in description["files"]:
            if os.path.basename(file) not in (CARD_FILE, SET_CONFIG_FILE):
                content = saved.content(file, MAX_BYTES)
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
        _write_cards(converted, folder, problems, path)

    replace_folder(path, foreign_entries, CONFIG_FILE, fill)


def foreign_entries(folder: Path) -> list[str]:
    """Return the entries of a saved folder that lorun-adapt did not write: other files, also among those of a set.

    Without a readable description, everything in the sets' folders counts as such.
    """
    entries = [entry.name for entry in folder.iterdir() if entry.name not in TOP_LEVEL]
    try:
        known = set(json.loads((folder / CONFIG_FILE).read_bytes())["files"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # there is none, or a damaged one
        known = set()
    of_sets = [path for path in (folder / ADAPTERS_FOLDER).rglob("*") if path.is_symlink() or not path.is_dir()]
    return entries + [name for path in of_sets if (name := path.relative_to(folder).as_posix()) not in known]


def _edited_cards(folder: Path, converted: Converted) -> dict[str, bytes]:
    """Return the cards that someone has edited in a saved folder of the same network, by their paths in it."""
    try:
        description = read_description(folder)
    except LoRunError:  # there is no such folder yet, or it is damaged
        return {}
    if description["network"] != converted.stage_map.network:
        return {}
    return {name: (folder / name).read_bytes() for name in edited_cards(folder, description)}


def _write_cards(converted: Converted, folder: Path, problems: Mapping[str, str], replaced: Path) -> None:
    """Write the cards and the description to ``folder``; edited cards of the folder that it replaces are kept."""
    for name, held in converted.sets.items():
        place = folder / ADAPTERS_FOLDER / name
        if held.info != AdapterInfo():
            (place / SET_CONFIG_FILE).write_text(adapter_info_text(held.info), encoding="utf-8")
        (place / CARD_FILE).write_text(set_card(converted, name, place), encoding="utf-8")
    (folder / CARD_FILE).write_text(model_card(converted, problems, folder), encoding="utf-8")
    files = {str(p.relative_to(folder).as_posix()): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / CONFIG_FILE).write_text(as_text(describe(converted, files)), encoding="utf-8")
    edited = _edited_cards(replaced, converted)
    for name in sorted(edited.keys() & files.keys()):
        # The description keeps the hash of the new card, so the next save sees again that this one is edited.
        (folder / name).write_bytes(edited[name])
        warnings.warn(
            f"{name} was edited, so it is kept as it is: delete it before saving to get a new one", stacklevel=2
        )


def _adapters(
    converted: Converted, held: AdapterSet
) -> Iterator[tuple[str, Group, StageAdapter, tuple[nn.Module, nn.Module]]]:
    """Yield for each adapter of a set: its folder in the set's, its group, the adapter, and two denoisers of the base.

    The first denoiser is the stage's own, the second is the one that PEFT loads the adapter on.
    """
    stage_map: StageMap = converted.stage_map
    for group in stage_map.groups:
        for site in group.sites:
            if site.stage in held.adapters:
                denoiser = converted.base.get_submodule(site.module)
                first = base_denoiser(converted.base, stage_map, group, site)
                adapter = held.adapters[site.stage][group.name]
                yield stage_folder(stage_map, group, site), group, adapter, (denoiser, first)


def _write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    metadata: dict[str, str],
    buffers: Collection[str],
    exact: Collection[str] = (),
) -> None:
    """Write a safetensors file.

    Args:
        file: the file to write.
        tensors: by name.
        dtype: converts floating-point tensors to this dtype; ``torch.int8`` packs the parameters in eight bits.
        metadata: of the file.
        buffers: names of the tensors that are buffers.
        exact: names of the tensors that keep their dtype.
    """
    stored: dict[str, Tensor] = {}
    for name, held in tensors.items():
        tensor = as_floats(held.detach().cpu())
        if dtype is not None and dtype.is_floating_point and tensor.is_floating_point() and name not in exact:
            tensor = tensor.to(dtype)
        if tensor.dtype not in DTYPES.values():
            advice = "torch.complex64" if tensor.is_complex() else "another dtype"
            raise LoRunError(f"safetensors cannot store the {tensor.dtype} of {name!r}: convert a network of {advice}")
        if not has_valid_values(tensor, name in buffers):
            if has_valid_values(held.detach(), name in buffers):
                raise LoRunError(
                    f"{name!r} has numbers too large for {dtype}: save with a wider dtype; nothing was written"
                )
            raise LoRunError(
                f"{name!r} has NaN or Inf: go back to weights from before training diverged; nothing was written"
            )
        if name == "__metadata__":
            raise LoRunError("safetensors cannot store a tensor named '__metadata__': rename the buffer")
        stored[name] = tensor.contiguous().clone()  # safetensors refuses tensors that share storage
    if dtype == torch.int8:
        stored = eight_bits.pack(stored, {*exact, *buffers})
    # Not save_file, which does not raise an OSError when the disk is full.
    file.write_bytes(to_safetensors(stored, metadata))

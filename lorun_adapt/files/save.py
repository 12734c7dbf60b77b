"""A converted network as a folder of safetensors and JSON.

    lorun_config.json                                stages, fingerprint of the base, hashes of files, the card's words
    base.safetensors                                 the whole network, each shared tensor once
    adapters/<set>/stage_00/adapter_config.json      a PEFT LoraConfig
    adapters/<set>/stage_00/adapter_model.safetensors
    adapters/<set>/README.md                         and, where a set has such, its noise and what is outside the stages
    README.md

A stage of several denoisers has a subfolder for each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from ..disk.folder import replace_folder, sha256
from ..disk.reading import DTYPES
from ..errors import LoRunError
from ..network.adapter import StageAdapter
from ..network.converted import AdapterInfo
from ..peft_format import writer as peft_format
from ..peft_format.limits import peft_view
from ..stages.stage_map import Group, stage_key
from ..stages.tensors import base_tensors
from ..util.modules import buffer_names as _buffers
from ..util.modules import has_valid_values
from .card import model_card, set_card
from .description import as_text, describe, read_description
from .layout import ADAPTERS_FOLDER, BASE_FILE, CARD_FILE, CONFIG_FILE, OUTSIDE_FILE, SET_CONFIG_FILE, TENSORS_FILE
from .saved import BASE_KEY, SavedFolder, stage_folder

if TYPE_CHECKING:
    from ..model.lorun_model import LoRunModel

LARGEST = 1 << 40  # bytes of a file that was loaded before


def save(lorun: LoRunModel, path: Path, dtype: torch.dtype | None, adapters_only: bool = False) -> None:
    """What :meth:`LoRunModel.save_pretrained` does."""
    if dtype is not None and (dtype not in DTYPES.values() or not dtype.is_floating_point):
        raise LoRunError(f"expected a floating-point dtype to save as, found {dtype}: use torch.float16, for example")
    if adapters_only:
        check_keeps_base(path)
    about = {BASE_KEY: lorun.fingerprint}  # one entry: of several, safetensors leaves the order open

    def fill(folder: Path) -> None:
        if not adapters_only:
            _write_tensors(
                folder / BASE_FILE, base_tensors(lorun.base, lorun.stage_map), dtype, about, _buffers(lorun.base)
            )
        problems: dict[str, str] = {}
        for name in lorun.adapter_names:
            for part, group, adapter, denoisers in _adapters(lorun, name):
                written = peft_format.write(*denoisers, group, adapter, dtype)
                if written.problem:
                    problems.setdefault(written.problem, part)
                (folder / part).mkdir(parents=True)
                buffers = {peft_format.PREFIX + spec.name for spec in group.tensors if spec.buffer}
                _write_tensors(folder / part / TENSORS_FILE, written.tensors, dtype, about, buffers, written.exact)
                written.config.save_pretrained(str(folder / part))
            if outside := lorun.outside_of(name):
                _write_tensors(folder / ADAPTERS_FOLDER / name / OUTSIDE_FILE, outside, dtype, about, ())
        _write_words(lorun, folder, problems)

    replace_folder(path, foreign_entries, CONFIG_FILE, fill)


def check_keeps_base(path: Path) -> None:
    """Refuse to put adapters alone in the place of a conversion with its base."""
    if (path / BASE_FILE).is_file():
        raise LoRunError(
            f"expected a folder for adapters alone, found {BASE_FILE} in {path}, which would be lost: choose "
            "another folder"
        )


def write_words(lorun: LoRunModel, path: Path) -> None:
    """Write what is not tensors of a saved folder anew: what is known of its sets, and the cards.

    ``lorun`` is what was loaded from it.
    """
    description = read_description(path, lorun.stage_map.num_tensors)
    if description["adapters"] != lorun.adapter_names or description["fingerprint"] != lorun.fingerprint:
        raise LoRunError(f"expected {path} as it was loaded, found other sets or another base: load it again")

    def fill(folder: Path) -> None:
        saved = SavedFolder(path, description)
        problems: dict[str, str] = {}
        for name in lorun.adapter_names:
            for part, group, adapter, denoisers in _adapters(lorun, name):
                if problem := peft_view(*denoisers, group, adapter).problem:
                    problems.setdefault(problem, part)
        for name in description["files"]:
            if os.path.basename(name) not in (CARD_FILE, SET_CONFIG_FILE):
                content = saved.content(name, LARGEST)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        _write_words(lorun, folder, problems)

    replace_folder(path, foreign_entries, CONFIG_FILE, fill)


def _write_words(lorun: LoRunModel, folder: Path, problems: Mapping[str, str]) -> None:
    for name in lorun.adapter_names:
        place = folder / ADAPTERS_FOLDER / name
        if lorun.adapter_info[name] != AdapterInfo():
            (place / SET_CONFIG_FILE).write_text(lorun.adapter_info[name].as_text(), encoding="utf-8")
        (place / CARD_FILE).write_text(set_card(lorun, name, place), encoding="utf-8")
    (folder / CARD_FILE).write_text(model_card(lorun, problems, folder), encoding="utf-8")
    files = {str(p.relative_to(folder).as_posix()): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / CONFIG_FILE).write_text(as_text(describe(lorun, files)), encoding="utf-8")


def foreign_entries(folder: Path) -> list[str]:
    """What someone has put into a saved folder: files beside ours, and sets that it knows nothing of."""
    found = [
        entry.name
        for entry in folder.iterdir()
        if entry.name not in (CONFIG_FILE, BASE_FILE, ADAPTERS_FOLDER, CARD_FILE)
    ]
    if (folder / ADAPTERS_FOLDER).is_dir():
        try:
            known = json.loads((folder / CONFIG_FILE).read_bytes())["adapters"]
            found += [
                f"{ADAPTERS_FOLDER}/{e.name}" for e in (folder / ADAPTERS_FOLDER).iterdir() if e.name not in known
            ]
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # nobody knows what is whose
    return found


# --- writing -------------------------------------------------------------------------------------


def _adapters(lorun: LoRunModel, name: str) -> Iterator[tuple[str, Group, StageAdapter, tuple[nn.Module, nn.Module]]]:
    """Of each adapter of a set its folder and its group, and the base's denoisers: the stage's, and the first."""
    for group in lorun.stage_map.groups:
        for site in group.sites:
            if stage_key(site.stage) in lorun.adapters[name]:
                part = f"{ADAPTERS_FOLDER}/{name}/{stage_folder(lorun.stage_map, group, site)}"
                denoiser, first = (lorun.base.get_submodule(s.module) for s in (site, group.sites[0]))
                yield part, group, lorun.adapter_of(group, site, name), (denoiser, first)


def _write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    about: dict[str, str],
    buffers: Collection[str],
    exact: Collection[str] = (),
) -> None:
    stored = {}
    for name, held in tensors.items():
        tensor = held.detach().cpu()
        if dtype is not None and tensor.is_floating_point() and name not in exact:
            tensor = tensor.to(dtype)
        if tensor.dtype not in DTYPES.values():
            raise LoRunError(f"expected a dtype that safetensors has, found {tensor.dtype} in {name!r}: change it")
        if not has_valid_values(tensor, name in buffers):
            reason = (
                "NaN or Inf"
                if not has_valid_values(held.detach(), name in buffers)
                else f"numbers too large for {dtype}"
            )
            raise LoRunError(
                f"expected finite numbers to save, found {reason} in {name!r}: go back to weights from before training "
                "diverged, or save with a wider dtype; nothing was written"
            )
        if name == "__metadata__":
            raise LoRunError("expected names that safetensors can store, found a buffer '__metadata__': rename it")
        stored[name] = tensor.contiguous().clone()  # safetensors refuses tensors that share storage
    # Not save_file: what that raises when a disk is full is no OSError.
    file.write_bytes(to_safetensors(stored, about))


# --- reading -------------------------------------------------------------------------------------

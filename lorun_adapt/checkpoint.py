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

import contextlib
import dataclasses
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from . import peft_format
from .adapter_files import BASE_KEY, Saved, local, read_set, stage_folder
from .assemble import StageAdapter, copy_network, held_tensors, lowrank_terms, share, stage_values
from .card import Card, model_card, set_card
from .description import (
    ADAPTERS,
    BASE,
    CARD,
    CONFIG,
    OUTSIDE,
    SET_CONFIG,
    TENSORS,
    as_text,
    describe,
    read_description,
    stage_map_of,
)
from .errors import LoRunError
from .folder import put_back, replace_folder, sha256, undisturbed
from .peft_limits import peft_view
from .peft_reader import readers_of
from .plain import check_dense
from .reading import DTYPES, Slot, file_limit, parse_tensors
from .set_config import SetConfig
from .stages import Group, StageMap, is_sound, stage_key, tensors_of

if TYPE_CHECKING:
    from .model import LoRunModel

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
            _write_tensors(folder / BASE, held_tensors(lorun.base, lorun.stage_map), dtype, about, _buffers(lorun.base))
        problems: dict[str, str] = {}
        for name in lorun.adapter_names:
            for part, group, adapter, denoisers in _adapters(lorun, name):
                written = peft_format.write(*denoisers, group, adapter, dtype)
                if written.problem:
                    problems.setdefault(written.problem, part)
                (folder / part).mkdir(parents=True)
                buffers = {peft_format.PREFIX + spec.name for spec in group.tensors if spec.buffer}
                _write_tensors(folder / part / TENSORS, written.tensors, dtype, about, buffers, written.exact)
                written.config.save_pretrained(str(folder / part))
            if outside := lorun.outside_of(name):
                _write_tensors(folder / ADAPTERS / name / OUTSIDE, outside, dtype, about, ())
        _write_words(lorun, folder, problems)

    replace_folder(path, foreign, CONFIG, fill)


def check_keeps_base(path: Path) -> None:
    """Refuse to put adapters alone in the place of a conversion with its base."""
    if (path / BASE).is_file():
        raise LoRunError(
            f"expected a folder for adapters alone, found {BASE} in {path}, which would be lost: choose another folder"
        )


def write_words(lorun: LoRunModel, path: Path) -> None:
    """Write what is not tensors of a saved folder anew: what is known of its sets, and the cards.

    ``lorun`` is what was loaded from it.
    """
    description = read_description(path, lorun.stage_map.tensors)
    if description["adapters"] != lorun.adapter_names or description["fingerprint"] != lorun.fingerprint:
        raise LoRunError(f"expected {path} as it was loaded, found other sets or another base: load it again")

    def fill(folder: Path) -> None:
        saved = Saved(path, description)
        problems: dict[str, str] = {}
        for name in lorun.adapter_names:
            for part, group, adapter, denoisers in _adapters(lorun, name):
                if problem := peft_view(*denoisers, group, adapter).problem:
                    problems.setdefault(problem, part)
        for name in description["files"]:
            if os.path.basename(name) not in (CARD, SET_CONFIG):
                content = saved.content(name, LARGEST)
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes(content)
        _write_words(lorun, folder, problems)

    replace_folder(path, foreign, CONFIG, fill)


def _write_words(lorun: LoRunModel, folder: Path, problems: Mapping[str, str]) -> None:
    for name in lorun.adapter_names:
        place = folder / ADAPTERS / name
        if lorun.set_config[name] != SetConfig():
            (place / SET_CONFIG).write_text(lorun.set_config[name].as_text(), encoding="utf-8")
        (place / CARD).write_text(set_card(lorun, name, place), encoding="utf-8")
    (folder / CARD).write_text(model_card(lorun, problems, folder), encoding="utf-8")
    files = {str(p.relative_to(folder).as_posix()): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    (folder / CONFIG).write_text(as_text(describe(lorun, files)), encoding="utf-8")


def stored_dtype(lorun: LoRunModel, path: Path) -> torch.dtype | None:
    """What the folder that ``lorun`` was loaded from stores its numbers as; None if they differ, or are as loaded."""
    found = set()
    for name in read_description(path, lorun.stage_map.tensors)["files"]:
        if name.endswith(Path(BASE).suffix):
            with safe_open(path / name, "pt") as file:
                found |= {DTYPES[file.get_slice(key).get_dtype()] for key in file.keys()}
    stored = {dtype for dtype in found if dtype.is_floating_point}
    loaded = {tensor.dtype for tensor in lorun.state_dict().values() if tensor.is_floating_point()}
    return stored.pop() if len(stored) == 1 and stored != loaded else None


def foreign(folder: Path) -> list[str]:
    """What someone has put into a saved folder: files beside ours, and sets that it knows nothing of."""
    found = [entry.name for entry in folder.iterdir() if entry.name not in (CONFIG, BASE, ADAPTERS, CARD)]
    if (folder / ADAPTERS).is_dir():
        try:
            known = json.loads((folder / CONFIG).read_bytes())["adapters"]
            found += [f"{ADAPTERS}/{e.name}" for e in (folder / ADAPTERS).iterdir() if e.name not in known]
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # nobody knows what is whose
    return found


def from_pretrained(
    source: str | os.PathLike[str],
    dun: nn.Module,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> LoRunModel:
    """Load a saved conversion.

    Nothing in the folder is trusted: every file is within the bounds of what ``dun`` can have and
    has the hash noted for it, every tensor has the network's shape and finite values, and nothing
    is executed. A load that a save of the same folder overtakes begins again.

    Args:
        source: a folder that ``save_pretrained`` wrote, or a repository of the Hub, as ``user/name``.
        dun: a network of the same class, with any weights. It gives the code, the device and the
            dtype, and is left untouched.
        revision, subfolder, token, cache_dir, local_files_only: of the repository, as
            ``huggingface_hub.hf_hub_download`` takes them.

    Raises:
        LoRunError: files that are missing, damaged, or for another network.
    """
    folder = local(
        source,
        _all_files,
        revision=revision,
        subfolder=subfolder,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
    )
    if not isinstance(dun, nn.Module):
        raise LoRunError(f"expected a network, found {type(dun).__name__}: build one of the class that was converted")
    with contextlib.suppress(OSError):  # what can't be put back is reported as missing
        put_back(Path(os.path.realpath(folder)))
    return undisturbed(folder, lambda: _load(folder, dun))


def _all_files(description: Mapping[str, Any] | None, key: str) -> list[str]:
    """What of a repository is needed to load all of it."""
    if description is None or key:
        raise LoRunError(
            f"expected a conversion, found {'one of its adapters' if key else f'no {CONFIG}'} in the repository: load "
            "its base first, and this with load_adapter"
        )
    _check_base(description, "the repository")
    return [name for name in description["files"] if os.path.basename(name) != CARD]


def _check_base(description: Mapping[str, Any], where: object) -> None:
    if BASE not in description["files"]:
        raise LoRunError(
            f"expected a conversion with its base, found adapters alone in {where}: load the base "
            f"{str(description.get('fingerprint'))[:12]} that they name, and these with load_adapter"
        )


def _load(folder: Path, dun: nn.Module) -> LoRunModel:
    from .model import LoRunModel

    description = read_description(folder, len(tensors_of(dun)))
    _check_base(description, folder)
    stage_map = stage_map_of(dun, description, folder / CONFIG)
    check_dense(dun)
    saved = Saved(folder, description)
    of_dun = {name: Slot(tuple(tensor.shape), tensor.dtype) for name, tensor, _ in tensors_of(dun)}
    content = saved.content(BASE, file_limit(of_dun))
    base = copy_network(dun)
    for group in stage_map.groups:
        firsts = {spec.name: stage_values(dun, group, spec)[0].clone() for spec in group.tensors}
        share(base, group, {s.name: firsts[s.name].zero_() if s.alone else firsts[s.name] for s in group.tensors})
    _fill_base(base, stage_map, content, folder / BASE)
    readers = readers_of(base, stage_map)
    sets = {
        name: read_set(saved, f"{ADAPTERS}/{name}", readers, base, stage_map, description["fingerprint"])
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


# --- writing -------------------------------------------------------------------------------------


def _adapters(lorun: LoRunModel, name: str) -> Iterator[tuple[str, Group, StageAdapter, tuple[nn.Module, nn.Module]]]:
    """Of each adapter of a set its folder and its group, and the base's denoisers: the stage's, and the first."""
    for group in lorun.stage_map.groups:
        for site in group.sites:
            if stage_key(site.stage) in lorun.adapters[name]:
                part = f"{ADAPTERS}/{name}/{stage_folder(lorun.stage_map, group, site)}"
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
        if not is_sound(tensor, name in buffers):
            reason = "NaN or Inf" if not is_sound(held.detach(), name in buffers) else f"numbers too large for {dtype}"
            raise LoRunError(
                f"expected finite numbers to save, found {reason} in {name!r}: go back to weights from before training "
                "diverged, or save with a wider dtype; nothing was written"
            )
        if name == "__metadata__":
            raise LoRunError("expected names that safetensors can store, found a buffer '__metadata__': rename it")
        stored[name] = tensor.contiguous().clone()  # safetensors refuses tensors that share storage
    # Not save_file: what that raises when a disk is full is no OSError.
    file.write_bytes(to_safetensors(stored, about))


def _buffers(network: nn.Module) -> set[str]:
    return {name for name, _, buffer in tensors_of(network) if buffer}


# --- reading -------------------------------------------------------------------------------------


def _fill_base(base: nn.Module, stage_map: StageMap, content: bytes, file: Path) -> None:
    places, buffers = held_tensors(base, stage_map), _buffers(base)
    slots = {name: Slot(tuple(tensor.shape), tensor.dtype) for name, tensor in places.items()}
    tensors, _ = parse_tensors(content, slots, str(file))
    for name, place in places.items():
        if name not in tensors:
            raise LoRunError(
                f"expected {name!r} of shape {tuple(place.shape)}, found nothing in {file}: build the network that was "
                "converted, or download the file again"
            )
        value = tensors[name].to(place)
        if not is_sound(value, name in buffers):
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

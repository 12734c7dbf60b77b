"""A converted network as a folder of safetensors and JSON.

    lorun_config.json                                stages, fingerprint of the base, hash of each file
    base.safetensors                                 the whole network, each shared tensor once
    adapters/<set>/stage_00/adapter_config.json      a PEFT LoraConfig
    adapters/<set>/stage_00/adapter_model.safetensors
    README.md

A stage of several denoisers has a subfolder for each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from peft import LoraConfig
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from . import peft_format
from .assemble import StageAdapter, copy_network, distinct_tensors, lowrank_terms, share, stage_values
from .card import model_card
from .description import CONFIG, as_text, describe, read_description, stage_map_of
from .errors import LoRunError
from .folder import as_path, put_back, replace_folder, sha256
from .peft_config import config_from_json
from .plain import check_dense
from .reading import DTYPES, Slot, file_limit, parse_json, parse_tensors, read_file
from .stages import Group, Site, StageMap, is_sound, stage_key, tensors_of

if TYPE_CHECKING:
    from .model import LoRunModel

AdapterSet = tuple[dict[tuple[str, Site], StageAdapter], LoraConfig]
Loaded = TypeVar("Loaded")

BASE, ADAPTERS, CARD = "base.safetensors", "adapters", "README.md"
TENSORS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE_KEY = "lorun_base"  # the fingerprint of the base, in the metadata of a safetensors file
RETRIES = 20


def save(lorun: LoRunModel, path: Path, dtype: torch.dtype | None) -> None:
    """What :meth:`LoRunModel.save_pretrained` does."""
    if dtype is not None and (dtype not in DTYPES.values() or not dtype.is_floating_point):
        raise LoRunError(f"expected a floating-point dtype to save as, found {dtype}: use torch.float16, for example")
    about = {BASE_KEY: lorun.fingerprint}  # one entry: of several, safetensors leaves the order open

    def fill(folder: Path) -> None:
        _write_tensors(folder / BASE, distinct_tensors(lorun.base), dtype, about, _buffers(lorun.base))
        problems: dict[str, str] = {}
        for name in lorun.adapter_names:
            for (group, site), adapter in _adapters(lorun, name):
                part = f"{name}/{stage_folder(lorun.stage_map, group, site)}"
                (folder / ADAPTERS / part).mkdir(parents=True)
                first, denoiser = (lorun.base.get_submodule(s.module) for s in (group.sites[0], site))
                written = peft_format.write(denoiser, first, group, adapter, dtype)
                buffers = {peft_format.PREFIX + spec.name for spec in group.tensors if spec.buffer}
                file = folder / ADAPTERS / part / TENSORS
                _write_tensors(file, written.tensors, dtype, about, buffers, written.exact)
                written.config.save_pretrained(str(folder / ADAPTERS / part))
                if written.problem:
                    problems.setdefault(written.problem, part)
        (folder / CARD).write_text(model_card(lorun, problems), encoding="utf-8")
        files = {str(p.relative_to(folder).as_posix()): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        (folder / CONFIG).write_text(as_text(describe(lorun, files)), encoding="utf-8")

    replace_folder(path, _foreign, CONFIG, fill)


def _foreign(folder: Path) -> list[str]:
    """What someone has put into a saved folder: files beside ours, and sets that it knows nothing of."""
    found = [entry.name for entry in folder.iterdir() if entry.name not in (CONFIG, BASE, ADAPTERS, CARD)]
    if (folder / ADAPTERS).is_dir():
        try:
            known = json.loads((folder / CONFIG).read_bytes())["adapters"]
            found += [f"{ADAPTERS}/{e.name}" for e in (folder / ADAPTERS).iterdir() if e.name not in known]
        except (ValueError, KeyError, TypeError, RecursionError):
            pass  # nobody knows what is whose
    return found


def from_pretrained(path: str | os.PathLike[str], dun: nn.Module) -> LoRunModel:
    """Load a saved conversion.

    Nothing in the folder is trusted: every file is within the bounds of what ``dun`` can have and
    has the hash noted for it, every tensor has the network's shape and finite values, and nothing
    is executed. A load that a save of the same folder overtakes begins again.

    Args:
        path: a folder that ``save_pretrained`` wrote.
        dun: a network of the same class, with any weights. It gives the code, the device and the
            dtype, and is left untouched.

    Raises:
        LoRunError: files that are missing, damaged, or for another network.
    """
    folder = as_path(path)
    if not isinstance(dun, nn.Module):
        raise LoRunError(f"expected a network, found {type(dun).__name__}: build one of the class that was converted")
    with contextlib.suppress(OSError):  # what can't be put back is reported as missing
        put_back(Path(os.path.realpath(folder)))
    return _undisturbed(folder, lambda: _load(folder, dun))


def _load(folder: Path, dun: nn.Module) -> LoRunModel:
    from .model import LoRunModel

    description = read_description(folder, dun)
    stage_map = stage_map_of(dun, description, folder / CONFIG)
    check_dense(dun)
    saved = _Saved(folder, description)
    of_dun = {name: Slot(tuple(tensor.shape), tensor.dtype) for name, tensor, _ in tensors_of(dun)}
    content = saved.content(BASE, file_limit(of_dun))
    base = copy_network(dun)
    for group in stage_map.groups:
        share(base, group, {spec.name: stage_values(dun, group, spec)[0].clone() for spec in group.tensors})
    _fill_base(base, content, folder / BASE)
    sets = {
        name: _read_set(saved, f"{ADAPTERS}/{name}", base, stage_map, description["fingerprint"])
        for name in description["adapters"]
    }
    ranks: dict[str, dict[str, int]] = {}
    for (group_name, _), adapter in [pair for adapters, _ in sets.values() for pair in adapters.items()]:
        ranks.setdefault(group_name, {name: term.rank for name, term in lowrank_terms(adapter).items()})
    return LoRunModel(
        base,
        dataclasses.replace(stage_map, ranks=ranks),
        sets,
        description["errors"],
        active=dict(enumerate(description["active"])),
        fingerprint=description["fingerprint"],
        trainable={name for name, p in dun.named_parameters() if p.requires_grad},
    )


def load_set(lorun: LoRunModel, path: Path, name: str, stage: int | None) -> AdapterSet:
    """What :meth:`LoRunModel.load_adapter` reads: the adapters by group and site, and a config."""
    return _undisturbed(path, lambda: _load_set(lorun, path, name, stage))


def _load_set(lorun: LoRunModel, path: Path, name: str, stage: int | None) -> AdapterSet:
    stage_map = lorun.stage_map
    if not os.path.isdir(path):
        raise LoRunError(f"expected a folder with an adapter, found none at {path}: give a saved folder or a set's")
    if stage is not None and (
        not hasattr(stage, "__index__") or int(stage) not in range(len(stage_map)) or isinstance(stage, bool)
    ):
        raise LoRunError(f"expected a stage in 0..{len(stage_map) - 1}, found {stage!r}: see print(lorun.stage_map)")
    saved, key = _place_of(path, lorun)
    if saved.description is not None and key == "":
        names = saved.description["adapters"]
        chosen = name if name in names else names[0] if len(names) == 1 else None
        if chosen is None:
            raise LoRunError(f"expected one adapter set or {name!r} in {path}, found {names}: give the folder of a set")
        key = f"{ADAPTERS}/{chosen}"
    if stage is None:
        return _read_set(saved, key, lorun.base, stage_map, lorun.fingerprint)
    if os.path.isdir(saved.folder / key / stage_key(stage)):
        key = f"{key}/{stage_key(stage)}".lstrip("/")
    found = {}
    for group in stage_map.groups:
        for site in group.sites:
            if site.stage == stage:
                part = f"{key}/{group.name}".lstrip("/") if len(stage_map.groups) > 1 else key
                found[group.name, site] = _read_adapter(saved, part, lorun.base, group, site, lorun.fingerprint)
    return _together(found)


def _place_of(path: Path, lorun: LoRunModel) -> tuple[_Saved, str]:
    """The saved folder that ``path`` is or lies in, if it knows of it, and the place within."""
    try:
        path = Path(os.path.abspath(path))
    except OSError as error:
        raise LoRunError(
            f"expected a folder, found that the current one is gone for {path}: change to another"
        ) from error
    for root in (path, *path.parents[1:4]):  # adapters/<set>, adapters/<set>/stage_00, or a denoiser's folder in that
        key = "" if root == path else path.relative_to(root).as_posix()
        if not os.path.lexists(root / CONFIG) or not f"{key}/".startswith(("/", f"{ADAPTERS}/")):
            continue
        description = read_description(root, lorun.base)
        if key and not any(name.startswith(f"{key}/") for name in description["files"]):
            break  # something that was put there later
        if description["fingerprint"] != lorun.fingerprint:
            raise _other_base(lorun.fingerprint, description["fingerprint"], str(root / CONFIG))
        theirs = stage_map_of(lorun.base, description, root / CONFIG)
        if _sites(theirs) != _sites(lorun.stage_map):
            raise LoRunError(
                f"expected the stages of this network, found others in {root / CONFIG}: load the base that it was "
                "trained on with from_pretrained"
            )
        return _Saved(root, description), key
    return _Saved(path, None), ""


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and values, the same whether a value is stored as float16 or float32."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        if tensor.is_floating_point():
            tensor = tensor.float()
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stage_folder(stage_map: StageMap, group: Group, site: Site) -> str:
    stage = stage_key(site.stage)
    return stage if len(stage_map.groups) == 1 else f"{stage}/{group.name}"


def _sites(stage_map: StageMap) -> list[tuple[str, tuple[Site, ...]]]:
    return [(group.name, group.sites) for group in stage_map.groups]


def _undisturbed(folder: Path, load: Callable[[], Loaded]) -> Loaded:
    """What ``load`` returns, tried again where a save has put another folder in the place meanwhile."""
    for _ in range(RETRIES):
        before = _identity(folder)
        try:
            return load()
        except LoRunError:
            if _identity(folder) == before:
                raise
    return load()


def _identity(folder: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(folder)
    except (OSError, ValueError):
        return None
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)


# --- writing -------------------------------------------------------------------------------------


def _adapters(lorun: LoRunModel, name: str) -> list[tuple[tuple[Group, Site], StageAdapter]]:
    return [
        ((group, site), lorun.adapter_of(group, site, name))
        for group in lorun.stage_map.groups
        for site in group.sites
        if stage_key(site.stage) in lorun.adapters[name]
    ]


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


@dataclass(frozen=True)
class _Saved:
    """A folder to read from, and the description that has its files' hashes, if there is one."""

    folder: Path
    description: Mapping[str, Any] | None

    def content(self, name: str, limit: int) -> bytes:
        known = self.description["files"].get(name) if self.description is not None else None
        if self.description is not None and known is None:
            raise LoRunError(
                f"expected a hash of {name!r}, found none in {self.folder / CONFIG}: it was put there later, or the "
                "folder is damaged; download it again"
            )
        content = read_file(self.folder, name, limit)
        if known is not None and hashlib.sha256(content).hexdigest() != known:
            raise LoRunError(f"expected {self.folder / name} as it was saved, found another hash: download it again")
        return content

    def folders(self, key: str) -> list[str]:
        """The names of the folders in ``key``."""
        try:
            return sorted(entry.name for entry in (self.folder / key).iterdir() if entry.is_dir())
        except OSError:
            return []


def _read_set(saved: _Saved, key: str, base: nn.Module, stage_map: StageMap, fingerprint: str) -> AdapterSet:
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
            found[group.name, site] = _read_adapter(saved, place, base, group, site, fingerprint)
    return _together(found)


def _together(found: Mapping[tuple[str, Site], tuple[StageAdapter, LoraConfig]]) -> AdapterSet:
    return {place: adapter for place, (adapter, _) in found.items()}, next(config for _, config in found.values())


def _read_adapter(
    saved: _Saved, key: str, base: nn.Module, group: Group, site: Site, fingerprint: str
) -> tuple[StageAdapter, LoraConfig]:
    first, denoiser = (base.get_submodule(place.module) for place in (group.sites[0], site))
    slots, highest = peft_format.slots(denoiser, group), peft_format.highest_rank(group)
    names = [f"{key}/{name}".lstrip("/") for name in (PEFT_CONFIG, TENSORS)]
    pickle = saved.folder / key / "adapter_model.bin"
    if os.path.exists(pickle) and not os.path.exists(saved.folder / names[1]):
        raise LoRunError(
            f"expected {TENSORS}, found a pickle at {pickle}: pickles can run code and are never read; save the "
            "adapter with safe_serialization=True"
        )
    where = [str(saved.folder / name) for name in names]
    options = parse_json(saved.content(names[0], 65_536 + 600 * len(slots)), where[0])
    config = config_from_json(options, where[0], len(group.tensors))
    content = saved.content(names[1], file_limit(slots, highest))
    tensors, about = parse_tensors(content, slots, where[1], highest)
    if about.get(BASE_KEY, fingerprint) != fingerprint:
        raise _other_base(fingerprint, about[BASE_KEY], where[1])
    return peft_format.read(tensors, config, denoiser, first, group, where[1]), config


def _fill_base(base: nn.Module, content: bytes, file: Path) -> None:
    places, buffers = distinct_tensors(base), _buffers(base)
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


def _other_base(held: str, found: str, where: str) -> LoRunError:
    return LoRunError(
        f"expected an adapter for the base {held[:12]}, found one for {found[:12]} in {where}: load the base that it "
        "was trained on with from_pretrained"
    )

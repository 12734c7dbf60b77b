"""A converted network as a folder of safetensors and JSON.

    lorun_config.json                                stages, fingerprint of the base, hash of each file
    base.safetensors                                 the whole network, each shared tensor once
    adapters/<set>/stage_00/adapter_config.json      a PEFT LoraConfig
    adapters/<set>/stage_00/adapter_model.safetensors
    README.md

A stage of several denoisers has a subfolder for each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from . import peft_format
from .assemble import StageAdapter, copy_network, distinct_tensors, share, stage_values
from .card import model_card
from .errors import LoRunError
from .find import tensor_specs
from .folder import replace_folder, sha256
from .stages import Group, Site, StageMap, stage_key

if TYPE_CHECKING:
    import os

    from .model import LoRunModel

FORMAT = 1
CONFIG, BASE, ADAPTERS, CARD = "lorun_config.json", "base.safetensors", "adapters", "README.md"
TENSORS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save(lorun: LoRunModel, path: Path, dtype: torch.dtype | None) -> None:
    """What :meth:`LoRunModel.save_pretrained` does."""
    if dtype is not None and not dtype.is_floating_point:
        raise LoRunError(f"expected a floating-point dtype to save as, found {dtype}: use torch.float16, for example")

    def fill(folder: Path) -> None:
        base = {name: _stored(t, dtype) for name, t in distinct_tensors(lorun.base).items()}
        save_file(base, folder / BASE)
        problems: dict[str, str] = {}
        for name in lorun.adapter_names:
            for (group, site), adapter in _adapters(lorun, name):
                part = folder / ADAPTERS / name / stage_folder(lorun.stage_map, group, site)
                part.mkdir(parents=True)
                denoiser = lorun.base.get_submodule(site.module)
                tensors, config, problem = peft_format.write(denoiser, group, adapter)
                save_file({key: _stored(t, dtype) for key, t in tensors.items()}, part / TENSORS)
                config.save_pretrained(str(part))
                if problem:
                    problems.setdefault(problem, f"{name}/{stage_folder(lorun.stage_map, group, site)}")
        (folder / CARD).write_text(model_card(lorun, problems), encoding="utf-8")
        files = {str(p.relative_to(folder).as_posix()): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        description = _describe(lorun, files)
        (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

    replace_folder(path, {CONFIG, BASE, ADAPTERS, CARD}.__contains__, CONFIG, fill)


def from_pretrained(path: str | os.PathLike[str], dun: nn.Module) -> LoRunModel:
    """Load a saved conversion.

    Args:
        path: a folder that ``save_pretrained`` wrote.
        dun: a network of the same class, with any weights. It gives the code, the device and the
            dtype, and is left untouched.

    Raises:
        LoRunError: files that are missing, damaged, or for another network.
    """
    from .model import DEFAULT_SET, LoRunModel

    folder = Path(path)
    description = read_description(folder)
    stage_map = _stage_map(dun, description, folder / CONFIG)
    base = copy_network(dun)
    for group in stage_map.groups:
        share(base, group, {spec.name: stage_values(dun, group, spec)[0].clone() for spec in group.tensors})
    tensors = _read_file(folder / BASE, BASE, description)
    _fill_base(base, tensors, folder / BASE)
    names = list(description["adapters"])
    first_set = names[0] if names else DEFAULT_SET
    sets = {
        name: _read_set(folder / ADAPTERS / name, f"{ADAPTERS}/{name}", base, stage_map, description) for name in names
    }
    adapters, config = sets.pop(first_set)
    lorun = LoRunModel(
        base,
        stage_map,
        adapters,
        config,
        description["errors"],
        name=first_set,
        fingerprint=description["fingerprint"],
        trainable={name for name, p in dun.named_parameters() if p.requires_grad},
    )
    for name, (adapters, config) in sets.items():
        lorun.add_set(name, adapters, config)
    lorun.set_adapter(dict(enumerate(description["active"])))
    return lorun


def load_set(
    lorun: LoRunModel, path: Path, name: str, stage: int | None
) -> tuple[dict[tuple[str, Site], StageAdapter], LoraConfig]:
    """What :meth:`LoRunModel.load_adapter` reads: the adapters by group and site, and a config."""
    stage_map = lorun.stage_map
    if not path.is_dir():
        raise LoRunError(f"expected a folder with an adapter, found none at {path}: give a saved folder or a set's")
    path = path.absolute()
    root = next((folder for folder in (path, *path.parents) if (folder / CONFIG).is_file()), None)
    description = read_description(root) if root is not None else None
    if description is not None:
        held = lorun.fingerprint
        if description["fingerprint"] != held:
            raise LoRunError(
                f"expected an adapter for the base {held[:12]}, found one for {description['fingerprint'][:12]} in "
                f"{root}: load the base that it was trained on with from_pretrained"
            )
    if path == root and description is not None:
        names = list(description["adapters"])
        chosen = name if name in names else names[0] if len(names) == 1 else None
        if chosen is None:
            raise LoRunError(f"expected one adapter set or {name!r} in {path}, found {names}: give the folder of a set")
        path = path / ADAPTERS / chosen
    if stage is not None and (path / stage_key(stage)).is_dir():
        path = path / stage_key(stage)
    key = path.relative_to(root).as_posix() if root is not None else ""
    if stage is None:
        return _read_set(path, key, lorun.base, stage_map, description)
    sites = [(group, site) for group in stage_map.groups for site in group.sites if site.stage == stage]
    if not sites:
        raise LoRunError(f"expected a stage in 0..{len(stage_map) - 1}, found {stage!r}: see print(lorun.stage_map)")
    adapters, configs = {}, []
    for group, site in sites:
        part = "" if len(stage_map.groups) == 1 else f"/{group.name}"
        found = _read_adapter(Path(f"{path}{part}"), f"{key}{part}", lorun.base, group, site, description)
        adapters[group.name, site], config = found
        configs.append(config)
    return adapters, configs[0]


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


# --- writing -------------------------------------------------------------------------------------


def _adapters(lorun: LoRunModel, name: str) -> list[tuple[tuple[Group, Site], StageAdapter]]:
    return [
        ((group, site), lorun.adapter_of(group, site, name))
        for group in lorun.stage_map.groups
        for site in group.sites
        if stage_key(site.stage) in lorun.adapters[name]
    ]


def _stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    tensor = tensor.detach()
    if dtype is not None and tensor.is_floating_point():
        tensor = tensor.to(dtype)
    return tensor.contiguous().clone()  # safetensors refuses tensors that share storage


def _describe(lorun: LoRunModel, files: Mapping[str, str]) -> dict[str, Any]:
    import peft

    from . import __version__

    return {
        "format": FORMAT,
        "network": lorun.stage_map.network,
        "groups": [
            {
                "name": group.name,
                "sites": [{"stage": s.stage, "module": s.module, "call": s.call} for s in group.sites],
                "tensors": {spec.name: list(spec.shape) for spec in group.tensors},
                "common": [spec.name for spec in group.tensors if spec.common],
            }
            for group in lorun.stage_map.groups
        ],
        "adapters": lorun.adapter_names,
        "ranks": {group: dict(ranks) for group, ranks in lorun.stage_map.ranks.items()},
        "errors": lorun.errors,
        "fingerprint": lorun.fingerprint,
        "active": [lorun.active_adapters[stage] for stage in range(len(lorun.stage_map))],
        "versions": {"lorun-adapt": __version__, "torch": torch.__version__, "peft": peft.__version__},
        "files": dict(files),
    }


# --- reading -------------------------------------------------------------------------------------


def read_description(folder: Path) -> dict[str, Any]:
    """``lorun_config.json``, checked for what the rest of the reading relies on."""
    file = folder / CONFIG
    if not file.is_file():
        raise LoRunError(f"expected {CONFIG} in {folder}, found none: give a folder that save_pretrained wrote")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        version = description["format"]
        for key, kind in (
            ("network", str),
            ("groups", list),
            ("adapters", list),
            ("ranks", dict),
            ("errors", dict),
            ("fingerprint", str),
            ("active", list),
            ("files", dict),
        ):
            if not isinstance(description[key], kind):
                raise TypeError(key)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoRunError(
            f"expected the description of a conversion, found damage in {file}: {error!r}; save it anew "
            "or download it again"
        ) from error
    if version != FORMAT:
        raise LoRunError(f"expected format {FORMAT} in {file}, found {version!r}: update lorun-adapt")
    return description


def _stage_map(dun: nn.Module, description: Mapping[str, Any], file: Path) -> StageMap:
    network = type_before_parametrizations(dun).__name__
    if description["network"] != network:
        raise LoRunError(
            f"expected the class {description['network']}, found {network} for {file}: build the network "
            "that was converted"
        )
    groups = []
    for entry in description["groups"]:
        try:
            sites = tuple(Site(site["stage"], site["module"], site["call"]) for site in entry["sites"])
            specs = tensor_specs(dun, sites, set(entry["common"]))
        except (AttributeError, KeyError, TypeError) as error:
            raise LoRunError(
                f"expected the stages that {file} names in {network}, found {error}: build the network "
                "that was converted, with as many stages"
            ) from error
        shapes = {spec.name: list(spec.shape) for spec in specs}
        if shapes != entry["tensors"]:
            name = next(n for n in {**shapes, **entry["tensors"]} if shapes.get(n) != entry["tensors"].get(n))
            raise LoRunError(
                f"expected {name!r} of shape {entry['tensors'].get(name)}, found {shapes.get(name)} in the "
                f"stages of {network} for {file}: build the network that was converted"
            )
        groups.append(Group(entry["name"], sites, specs))
    return StageMap(network, tuple(groups), (), description["ranks"])


def _fill_base(base: nn.Module, tensors: Mapping[str, Tensor], file: Path) -> None:
    places = distinct_tensors(base)
    for name in (*places, *tensors):
        if name not in tensors or name not in places or tensors[name].shape != places[name].shape:
            here, there = (tuple(t[name].shape) if name in t else "nothing" for t in (places, tensors))
            raise LoRunError(
                f"expected {name!r} of shape {here}, found {there} in {file}: build the network that was "
                "converted, or download the file again"
            )
    with torch.no_grad():
        for name, place in places.items():
            place.copy_(tensors[name])


def _read_set(
    path: Path, key: str, base: nn.Module, stage_map: StageMap, description: Mapping[str, Any] | None
) -> tuple[dict[tuple[str, Site], StageAdapter], LoraConfig]:
    """The set in the folder ``path``; ``key`` is its place in the ``description`` that has its hashes."""
    adapters, configs = {}, []
    for group in stage_map.groups:
        for site in group.sites:
            part = stage_folder(stage_map, group, site)
            if description is not None and f"{key}/{part}/{TENSORS}" not in description["files"]:
                continue  # a set may hold some stages only
            found = _read_adapter(path / part, f"{key}/{part}", base, group, site, description)
            adapters[group.name, site], config = found
            configs.append(config)
    if not configs:
        raise LoRunError(f"expected adapters for {len(stage_map)} stages in {path}, found none: give a set's folder")
    return adapters, configs[0]


def _read_adapter(
    folder: Path, key: str, base: nn.Module, group: Group, site: Site, description: Mapping[str, Any] | None
) -> tuple[StageAdapter, LoraConfig]:
    tensors = _read_file(folder / TENSORS, f"{key}/{TENSORS}", description)
    _check_hash(folder / PEFT_CONFIG, f"{key}/{PEFT_CONFIG}", description)
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoRunError(
            f"expected a LoraConfig in {folder / PEFT_CONFIG}, found {error!r}: save the adapter anew"
        ) from error
    if type(config) is not LoraConfig:
        raise LoRunError(
            f"expected a LoraConfig in {folder / PEFT_CONFIG}, found {type(config).__name__}: "
            "only LoRA adapters can be loaded"
        )
    return peft_format.read(tensors, config, base.get_submodule(site.module), group, str(folder / TENSORS)), config


def _read_file(file: Path, key: str, description: Mapping[str, Any] | None) -> dict[str, Tensor]:
    _check_hash(file, key, description)
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise LoRunError(f"expected a safetensors file, found damage in {file}: {error}; download it again") from error


def _check_hash(file: Path, key: str, description: Mapping[str, Any] | None) -> None:
    if not file.is_file():
        raise LoRunError(f"expected a file {file}, found none: download the folder again")
    if description is not None and sha256(file) != description["files"].get(key):
        raise LoRunError(f"expected {file} as it was saved, found another hash: download it again")

"""``lorun_config.json``: the class of the converted network, its stages, and the hash of every file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .._version import __version__
from ..disk.reading import parse_json, read_file
from ..errors import LoRunError
from ..network.converted import Card, Converted
from ..stages.checks import check_alike, check_parameters
from ..stages.specs import tensor_specs
from ..stages.stage_map import Group, Site, StageMap, stage_key
from ..util.text import is_short
from .layout import CONFIG_FILE, NAMES, is_adapter_name

FORMATS = {True: 1, False: 2}  # by whether the stages share the base, as 0.1.0 takes for granted
MAX_SETS, MAX_STAGES = 100, 1000
MAX_BYTES = 64 << 20  # of a file


def describe(converted: Converted, files: Mapping[str, str]) -> dict[str, Any]:
    """Return the contents of the file.

    Args:
        converted: the network to describe.
        files: the SHA-256 of each file, by its path in the folder.

    Raises:
        LoRunError: a card with long or unprintable text; more sets or stages than a folder may have.
    """
    for items, most, what in (
        (converted.sets, MAX_SETS, "sets: name some in selected_adapters="),
        (converted.stage_map, MAX_STAGES, "stages: count fewer calls in calls="),
    ):
        if len(items) > most:
            raise LoRunError(f"expected at most {most} to save, found {len(items)} {what}")
    card = dataclasses.asdict(converted.card)
    if not is_card(card):
        raise LoRunError(f"the card must have short lines of printable text, not {card}: change lorun.card")
    return {
        "format": FORMATS[converted.stage_map.shared],
        "network": converted.stage_map.network,
        "groups": groups_of(converted.stage_map),
        "adapters": list(converted.sets),
        "errors": converted.residuals,
        "fingerprint": converted.fingerprint,
        "card": card,
        "active": [converted.active[stage] for stage in range(len(converted.stage_map))],
        "versions": {"lorun-adapt": __version__, "torch": torch.__version__, "peft": peft.__version__},
        "files": dict(files),
    }


def groups_of(stage_map: StageMap) -> list[dict[str, Any]]:
    """Return the part of the file that says where the stages are."""
    return [
        {
            "name": group.name,
            "sites": [{"stage": s.stage, "module": s.module, "call": s.call} for s in group.sites],
            "tensors": {spec.name: list(spec.shape) for spec in group.tensors},
            "common": [spec.name for spec in group.tensors if spec.common],
            "without_base": [spec.name for spec in group.tensors if spec.without_base],
        }
        for group in stage_map.groups
    ]


def as_text(description: Mapping[str, Any]) -> str:
    """Return the text of the file: the description with a hash of it."""
    return json.dumps({**description, "sha256": _digest(description)}, indent=2) + "\n"


def read_description(folder: Path, num_tensors: int | None = None) -> dict[str, Any]:
    """Read and validate the description in ``folder``.

    Args:
        folder: a saved folder.
        num_tensors: the number of tensors of the network or its stages, which limits the size of the file; None if the
            network is unknown.

    Raises:
        LoRunError: no description, a damaged one, or one in a newer format.
    """
    return parse_description(description_bytes(folder, num_tensors), folder / CONFIG_FILE)


def description_bytes(folder: Path, num_tensors: int | None = None) -> bytes:
    """Return the bytes of the description in ``folder``; see :func:`read_description`."""
    if not os.path.isfile(folder / CONFIG_FILE):
        raise LoRunError(
            f"no {CONFIG_FILE} in {folder}: give a folder that save_pretrained wrote, or a repository of the Hub as "
            "user/name"
        )
    limit = MAX_BYTES if num_tensors is None else 1_000_000 + 100 * MAX_STAGES * num_tensors
    return read_file(folder, CONFIG_FILE, min(limit, MAX_BYTES))


def parse_description(content: bytes, file: Path) -> dict[str, Any]:
    """Parse and validate a description; ``file`` is its path, for error messages."""
    description = parse_json(content, str(file))
    version = description.get("format") if isinstance(description, dict) else None
    if type(version) is int and version > max(FORMATS.values()):
        raise LoRunError(
            f"{file} has format {str(version)[:20]}, but this version reads formats up to {max(FORMATS.values())}: "
            "update lorun-adapt"
        )
    wrong = None if type(version) is int and version in FORMATS.values() else "format"
    if wrong is None:
        wrong = _invalid_key(description) if is_unchanged(description) else "sha256"
    if wrong is not None:
        raise LoRunError(f"{file} has an invalid {wrong!r}: save the conversion again or download it again")
    return description


def is_unchanged(description: Mapping[str, Any]) -> bool:
    """Whether the hash in a description is correct."""
    try:
        return description.get("sha256") == _digest({k: value for k, value in description.items() if k != "sha256"})
    except RecursionError:  # nested too deeply to be written again
        return False


def _digest(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _invalid_key(description: Mapping[str, Any]) -> str | None:
    """Return the first key with an invalid value; None if all are valid."""
    for key, is_valid in (
        ("network", _is_str),
        ("groups", lambda v: isinstance(v, list) and bool(v) and all(map(_is_group, v))),
        ("adapters", lambda v: _are(v, list, is_adapter_name) and 0 < len(v) == len(set(v)) <= MAX_SETS),
        ("fingerprint", _is_digest),
        ("card", is_card),
        ("files", lambda v: _are(v, dict, _is_file) and all(map(_is_digest, v.values()))),
        ("active", lambda v: _are(v, list, lambda name: name in description["adapters"])),
        ("errors", lambda v: isinstance(v, dict) and v.keys() == {g["name"] for g in description["groups"]}),
    ):
        if key not in description or not is_valid(description[key]):
            return key
    groups = description["groups"]
    stages = [{site["stage"] for site in group["sites"]} for group in groups]
    if any(len(found) < len(group["sites"]) for found, group in zip(stages, groups)):
        return "groups"
    every = set.union(*stages)
    if len({group["name"] for group in groups}) < len(groups) or every != set(range(len(every))):
        return "groups"
    if len(description["active"]) != len(every):
        return "active"
    if not all(_are_errors(description["errors"][group["name"]], group) for group in groups):
        return "errors"
    held = {tuple(name.split("/")[1:3]) for name in description["files"]}
    if any((name, stage_key(stage)) not in held for stage, name in enumerate(description["active"])):
        return "active"
    return None


def _are(value: object, kind: type, is_valid: Callable[[Any], bool]) -> bool:
    return isinstance(value, kind) and all(is_valid(item) for item in value)  # type: ignore[attr-defined]


def _is_str(value: object) -> bool:
    return isinstance(value, str)


def _is_file(value: object) -> bool:
    return isinstance(value, str) and NAMES.fullmatch(value) is not None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**48


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _is_group(value: object) -> bool:
    return (
        isinstance(value, dict)
        and is_adapter_name(value.get("name"))
        and isinstance(value.get("sites"), list)
        and 1 < len(value["sites"]) <= MAX_STAGES
        and all(map(_is_site, value["sites"]))
        and isinstance(value.get("tensors"), dict)
        and all(_are(shape, list, _is_count) for shape in value["tensors"].values())
        and _are(value.get("common"), list, _is_str)
        and _are(value.get("without_base"), list, lambda name: isinstance(name, str) and name in value["tensors"])
    )


def _is_site(value: object) -> bool:
    return (
        isinstance(value, dict)
        and _is_count(value.get("stage"))
        and isinstance(value.get("module"), str)
        and value["module"] != ""
        and (value.get("call") is None or _is_count(value["call"]))
    )


def _are_errors(value: object, group: Mapping[str, Any]) -> bool:
    def is_pair(pair: object) -> bool:
        return _are(pair, list, lambda n: type(n) in (int, float) and 0 <= n < 1e100) and len(pair) == 2  # type: ignore[arg-type]

    return (
        isinstance(value, dict)
        and value.keys() <= group["tensors"].keys()
        and all(_are(rows, list, is_pair) and len(rows) == len(group["sites"]) for rows in value.values())
    )


# --- against the network -------------------------------------------------------------------------


def stage_map_of(dun: nn.Module, description: Mapping[str, Any], file: Path) -> StageMap:
    """Return the stages that the description names, located in ``dun``.

    Args:
        dun: a network of the converted class.
        description: a valid description.
        file: its path, for error messages.

    Raises:
        LoRunError: a network of another class, or with other stages.
    """
    network = type_before_parametrizations(dun).__name__
    if description["network"] != network:
        raise LoRunError(
            f"expected the class {description['network'][:100]}, found {network} for {file}: pass a network of the "
            "converted class"
        )
    modules = dict(dun.named_modules(remove_duplicate=False))
    sites_of = [
        tuple(Site(site["stage"], site["module"], site.get("call")) for site in entry["sites"])
        for entry in description["groups"]
    ]
    # Look the names up in named_modules(): getattr with a name from a file could run a property.
    lacking = [site.module for sites in sites_of for site in sites if site.module not in modules]
    if lacking:
        raise LoRunError(
            f"{network} has no {lacking[0][:100]!r}, which {file} lists as a stage: build the network with the same "
            "number of stages as the converted one"
        )
    _check_separate(modules, sites_of, file)
    groups = []
    for sites, entry in zip(sites_of, description["groups"]):
        check_parameters(dun, [site.module for site in sites])
        check_alike(dun, [(site.module, site.call) for site in sites], str(file))
        specs = tensor_specs(dun, sites, set(entry["common"]))
        shapes = {spec.name: list(spec.shape) for spec in specs}
        if shapes != entry["tensors"]:
            name = next(n for n in {**shapes, **entry["tensors"]} if shapes.get(n) != entry["tensors"].get(n))
            raise LoRunError(
                f"expected {name[:200]!r} of shape {entry['tensors'].get(name)}, found {shapes.get(name)} in the "
                f"stages of {network} for {file}: build the network with the same sizes as the converted one"
            )
        odd = [spec.name for spec in specs if spec.name in entry["without_base"] and not spec.adaptable]
        if odd:
            raise LoRunError(
                f"{file} stores no base for {odd[0][:200]!r}, but no low-rank term can replace it: save the conversion "
                "again or download it again"
            )
        specs = tuple(dataclasses.replace(spec, without_base=spec.name in entry["without_base"]) for spec in specs)
        groups.append(Group(entry["name"], sites, specs))
    return StageMap(network, tuple(groups), shared=description["format"] == FORMATS[True])


def _check_separate(modules: Mapping[str, nn.Module], groups: Sequence[Sequence[Site]], file: Path) -> None:
    """Raise an error if stages overlap; one module may stand for several stages if it has several parents or calls."""
    objects: dict[int, list[tuple[int, Site]]] = {}
    for index, sites in enumerate(groups):
        for site in sites:
            objects.setdefault(id(modules[site.module]), []).append((index, site))
    for key, found in objects.items():
        names, calls = {site.module for _, site in found}, sorted({-1 if s.call is None else s.call for _, s in found})
        module = modules[found[0][1].module]
        looped = calls[0] >= 0
        right = calls == list(range(len(found))) and len(names) == 1 if looped else calls == [-1]
        callable_ = type(module).forward is not nn.Module.forward
        inside = any(id(child) != key and id(child) in objects for child in module.modules())
        if len({index for index, _ in found}) > 1 or not right or (looped and not callable_) or inside:
            raise LoRunError(
                f"the stages in {file} overlap: one appears twice or inside another at {found[0][1].module!r}; save "
                "the conversion again or download it again"
            )


def is_card(value: object) -> bool:
    """Whether ``value`` is a valid entry for the card."""
    return (
        isinstance(value, dict)
        and value.keys() == {field.name for field in dataclasses.fields(Card)}
        and all(entry is None or is_short(entry) for entry in value.values())
    )

"""Adapters whose files are laid out alike: of the first it is worked out what is where, the others are filled in.

What a file must be, and which of its tensors goes where, depends on its config, its header and its length alone. Where
these are those of a file that was found right, only the numbers are new.
"""

from __future__ import annotations

import math
import struct
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..disk.reading import DTYPES, parse_json
from ..network.adapter import StageAdapter

TABLES = {dict, OrderedDict, set}

Place = tuple[str, str]  # a low-rank term, or "", and the name of a parameter in it, as in a StageAdapter


class Template(NamedTuple):
    """An adapter without its numbers, and where these are in the file.

    Attributes:
        start: the first byte after the header.
        stored: the dtype of all tensors in the file.
        places: where they go, with their shapes and how many numbers they have, in the order of the file.
        like: of the dtype and on the device of the adapter.
    """

    adapter: StageAdapter
    start: int
    stored: torch.dtype
    places: list[tuple[Place, torch.Size]]
    sizes: list[int]
    like: Tensor

    def filled(self, content: bytes) -> StageAdapter | None:
        """The adapter in another file; None where some of its numbers are not finite.

        Its tensors are parts of one: to make each by itself would take longer than all else.
        """
        numbers = torch.frombuffer(bytearray(content), dtype=self.stored, offset=self.start).to(self.like)
        if not math.isfinite(numbers.sum().item()):
            return None
        adapter = _twin(self.adapter)
        for ((term, name), shape), part in zip(self.places, numbers.split(self.sizes)):
            holder = adapter._modules[term] if term else adapter
            holder._parameters[name] = nn.Parameter(part.view(shape))
        return adapter


def template_of(
    content: bytes, tensors: Mapping[str, Tensor], places: Mapping[str, Place], adapter: StageAdapter
) -> Template | None:
    """What others like this file are filled into, if all that it holds goes into the adapter as it is.

    Args:
        content: the file, which safetensors has accepted.
        tensors: what it holds.
        places: where each of these may have gone.
        adapter: what was made of it.
    """
    (length,) = struct.unpack("<Q", content[:8])
    header = parse_json(content[8 : 8 + length], "")
    names = sorted(tensors, key=lambda name: header[name]["data_offsets"])
    held = {("", name): p for name, p in adapter._parameters.items()}
    held |= {(term, name): p for term, module in adapter._modules.items() for name, p in module._parameters.items()}
    stored = {DTYPES[header[name]["dtype"]] for name in names}
    whole = len(held) == len(names) and {places.get(name) for name in names} == held.keys()
    alike = len(stored) == 1 == len({(p.dtype, p.device) for p in held.values()})
    if not whole or not alike or adapter._buffers or sys.byteorder != "little":
        return None
    (dtype,) = stored
    targets = [held[places[name]].detach() for name in names]
    floats = dtype.is_floating_point and targets[0].is_floating_point()
    if not floats or (8 + length) % dtype.itemsize or not all(target.numel() for target in targets):
        return None
    if not all(torch.equal(t.flatten(), tensors[name].flatten().to(t)) for name, t in zip(names, targets)):
        return None
    empty = _twin(adapter)
    for module in (empty, *empty._modules.values()):
        module._parameters = dict.fromkeys(module._parameters)
    return Template(
        empty,
        8 + length,
        dtype,
        [(places[name], target.shape) for name, target in zip(names, targets)],
        [target.numel() for target in targets],
        torch.empty(0).to(targets[0]),
    )


def _twin(adapter: StageAdapter) -> StageAdapter:
    """An adapter with modules of its own around the same tensors."""
    result = _bare_twin(adapter)
    result._modules = {name: _bare_twin(term) for name, term in adapter._modules.items()}
    return result


def _bare_twin(module: nn.Module) -> nn.Module:
    """A module like another, with tables of its own: hooks, parameters, buffers, submodules."""
    twin = module.__new__(type(module))
    held = module.__dict__.copy()
    for name, value in module.__dict__.items():
        if value.__class__ in TABLES:
            held[name] = value.copy() if value else value.__class__()  # which is quicker
    twin.__dict__ = held
    return twin

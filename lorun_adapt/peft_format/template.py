"""Read adapters quickly whose files have the same layout: the first is read in full, the others fill a copy of it.

What is valid in a file, and where each tensor goes, depends only on its config, its header and its length. For a
file that has these in common with one that was read before, only the numbers are new.
"""

from __future__ import annotations

import math
import struct
import sys
from collections import OrderedDict
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..disk.reading import DTYPES, parse_json
from ..network.adapter import StageAdapter
from .lora import bias_of

TABLES = {dict, OrderedDict, set}  # the types of the tables that a module keeps

Module = TypeVar("Module", bound=nn.Module)

Place = tuple[str, str]  # in a StageAdapter: a low-rank term, or "", and the name of a parameter in it


class Difference(NamedTuple):
    """How to compute a bias from a file: ``base`` plus ``scaling`` times the tensor in the file."""

    base: Tensor
    scaling: float


class Part(NamedTuple):
    """A tensor in a file.

    Attributes:
        place: where it goes; None if nowhere.
        shape: its shape there.
        difference: how the adapter's tensor is computed from it; None if it is that tensor.
    """

    place: Place | None
    shape: torch.Size
    difference: Difference | None

    def value(self, stored: Tensor) -> Tensor:
        """The adapter's tensor."""
        value = stored.view(self.shape)
        return value if self.difference is None else bias_of(self.difference.base, value, self.difference.scaling)


class Template(NamedTuple):
    """An adapter without its numbers, and the places of these in a file.

    Attributes:
        adapter: the adapter; its parameters are None.
        start: the first byte after the header.
        stored: the dtype of all tensors in the file.
        parts: the tensors in the order of the file.
        sizes: how many numbers each tensor has.
        like: an empty tensor of the adapter's dtype, on its device.
    """

    adapter: StageAdapter
    start: int
    stored: torch.dtype
    parts: list[Part]
    sizes: list[int]
    like: Tensor

    def filled(self, content: bytes) -> StageAdapter | None:
        """The adapter with the numbers of another file; None if some are not finite.

        Its tensors are views of one tensor: making each by itself would take most of the time.
        """
        numbers = torch.frombuffer(bytearray(content), dtype=self.stored, offset=self.start).to(self.like)
        if not math.isfinite(numbers.sum().item()):
            return None
        adapter = _copy_of_adapter(self.adapter)
        for part, value in zip(self.parts, numbers.split(self.sizes)):
            if part.place is not None:
                term, name = part.place
                holder = adapter._modules[term] if term else adapter
                assert holder is not None
                tensor = part.value(value)
                if part.difference is not None and not math.isfinite(tensor.sum().item()):
                    return None
                holder._parameters[name] = nn.Parameter(tensor)
        return adapter


def template_of(
    content: bytes,
    tensors: Mapping[str, Tensor],
    places: Mapping[str, Place],
    differences: Mapping[str, Difference | None],
    adapter: StageAdapter,
) -> Template | None:
    """The template for files like this one; None if its tensors do not go into the adapter unchanged.

    Args:
        content: the file, which safetensors has accepted.
        tensors: the tensors in the file.
        places: where each of them may have gone.
        differences: what biases were computed from; None for those that were not read, as the file has the bias itself.
        adapter: the adapter that was made of the file.
    """
    (length,) = struct.unpack("<Q", content[:8])
    header = parse_json(content[8 : 8 + length], "")
    names = sorted(tensors, key=lambda name: header[name]["data_offsets"])
    modules = [("", adapter), *((term, module) for term, module in adapter._modules.items() if module is not None)]
    held = {(t, name): p for t, module in modules for name, p in module._parameters.items() if p is not None}
    stored = {DTYPES[header[name]["dtype"]] for name in names}
    read = [name for name in names if differences.get(name, ...) is not None]
    whole = len(held) == len(read) and {places.get(name) for name in read} == held.keys()
    alike = len(stored) == 1 == len({(p.dtype, p.device) for p in held.values()})
    if not whole or not alike or adapter._buffers or sys.byteorder != "little":
        return None
    (dtype,) = stored
    targets = {name: held[places[name]].detach() for name in read}
    like = targets[read[0]]
    floats = dtype.is_floating_point and like.is_floating_point()
    if not floats or (8 + length) % dtype.itemsize or not all(target.numel() for target in targets.values()):
        return None
    if any(tensors[name].numel() != target.numel() for name, target in targets.items()):
        return None  # a rank was above the tensor's limit
    parts = [
        Part(places[name], targets[name].shape, differences.get(name))
        if name in targets
        else Part(None, tensors[name].shape, None)
        for name in names
    ]
    if not all(
        torch.equal(targets[name], part.value(tensors[name].to(like)))
        for name, part in zip(names, parts)
        if name in targets
    ):
        return None
    empty = _copy_of_adapter(adapter)
    for module in (empty, *empty._modules.values()):
        assert module is not None
        module._parameters = dict.fromkeys(module._parameters)
    return Template(
        empty,
        8 + length,
        dtype,
        parts,
        [tensors[name].numel() for name in names],
        torch.empty(0).to(like),
    )


def _copy_of_adapter(adapter: StageAdapter) -> StageAdapter:
    """An adapter with modules of its own around the same tensors."""
    result = _copy_of_module(adapter)
    result._modules = {name: _copy_of_module(term) for name, term in adapter._modules.items() if term is not None}
    return result


def _copy_of_module(module: Module) -> Module:
    """A module with tables of its own (hooks, parameters, buffers, submodules) and the same content."""
    result = module.__new__(type(module))
    attributes = result.__dict__  # written to directly: this runs for every term, and nn.Module's setattr is slow
    for name, value in module.__dict__.items():
        kind = value.__class__
        attributes[name] = value if kind not in TABLES else value.copy() if value else kind()
    return result

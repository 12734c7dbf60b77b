"""Run a network once and note which modules are called, how often, in which order, on what size, and what is read."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import LoRunError
from ..util.copying import copy_network
from ..util.modules import hint_on_arguments
from ..util.nested import device_of, tensors_in, to_device
from ..util.seeds import seeded
from .locations import Location
from .reads import ReadTrace


@dataclass(frozen=True)
class Call:
    """A call of a module.

    Attributes:
        start: its place among all calls and operations of the forward.
        end: that of its last operation.
        size: the last two dimensions of the first tensor that it took, if it took one.
    """

    start: int
    end: int
    size: tuple[int, ...]

    def is_smaller(self, other: Call) -> bool:
        """Whether it took smaller images than ``other``; one pixel is no image."""
        sizes = self.size, other.size
        return (
            all(len(size) == 2 and min(size) > 1 for size in sizes)
            and self.size != other.size
            and all(a <= b for a, b in zip(*sizes))
        )


class CallTrace:
    """The calls of the modules of ``dun`` in one forward; empty where nothing was run.

    Args:
        dun: the network.
        calls: by the id of a module, its calls.
        reads: the tensors that the forward read, where that is known.
    """

    def __init__(self, dun: nn.Module, calls: Mapping[int, Sequence[Call]], reads: ReadTrace | None = None) -> None:
        self._dun = dun
        self._calls = calls
        self._reads = reads

    def _calls_of(self, path: str) -> Sequence[Call]:
        return self._calls.get(id(self._dun.get_submodule(path)), ())

    @property
    def is_empty(self) -> bool:
        return not self._calls

    def was_called(self, module: nn.Module) -> bool:
        return id(module) in self._calls

    def reaches(self, path: str) -> bool:
        """Whether the module at ``path``, or one within it, was called."""
        return any(id(module) in self._calls for module in self._dun.get_submodule(path).modules())

    def num_calls(self, path: str) -> int:
        return len(self._calls_of(path))

    def in_order(self, locations: list[Location]) -> list[Location]:
        """Return ``locations`` in the order in which they run, or, where that is not known, of their numbers."""
        found = self._found(locations)
        if found is None:
            return _by_number(locations)
        return [location for location, _ in sorted(zip(locations, found), key=lambda pair: pair[1].start)]

    def lack_measurements(self, locations: Sequence[Location]) -> bool:
        """Whether no measurements come in between ``locations``, which run one after another: they are layers."""
        found = self._found(locations)
        if not found or self._reads is None or any(a.end > b.start for a, b in zip(found, found[1:])):
            return False
        return not self._reads.between([(call.start, call.end) for call in found])

    def shrink(self, locations: Sequence[Location]) -> bool:
        """Whether a later one of ``locations`` runs on smaller images than an earlier one, as in an encoder."""
        found = self._found(locations) or ()
        return any(after.is_smaller(before) for before, after in zip(found, found[1:]))

    def gap_of_coarser(self, locations: Sequence[Location]) -> tuple[int, int] | None:
        """The gap in which all smaller images run, if it is one: then ``locations`` are in the halves of a U-Net."""
        found = self._found(locations) or ()
        gaps = [(before.end, after.start) for before, after in zip(found, found[1:])]
        all_calls = [call for calls in self._calls.values() for call in calls]
        smaller = [call.start for call in all_calls if found and call.is_smaller(found[0])]
        return next((gap for gap in gaps if smaller and all(gap[0] < start < gap[1] for start in smaller)), None)

    def are_within(self, locations: Sequence[Location], span: tuple[int, int]) -> bool:
        """Whether ``locations`` run within a span of the forward."""
        found = self._found(locations) or ()
        return bool(found) and all(span[0] < call.start and call.end < span[1] for call in found)

    def changes_size(self, locations: Sequence[Location]) -> bool:
        """Whether ``locations`` run on images of several sizes."""
        return len({call.size for call in self._found(locations) or ()}) > 1

    def _found(self, locations: Sequence[Location]) -> list[Call] | None:
        """The calls of ``locations``; None where one of them was not called."""
        calls = [self._calls_of(path) or self._call_of_items(path) for path, _ in locations]
        if not all(len(found) > (call or 0) for found, (_, call) in zip(calls, locations)):
            return None
        return [found[call or 0] for found, (_, call) in zip(calls, locations)]

    def _call_of_items(self, path: str) -> Sequence[Call]:
        """What a list runs, as one call: from its first item that runs to the last."""
        inside = [
            call for module in self._dun.get_submodule(path).modules() for call in self._calls.get(id(module), ())
        ]
        return [Call(inside[0].start, max(call.end for call in inside), inside[0].size)] if inside else []


def trace_calls(dun: nn.Module, example_inputs: Sequence[object]) -> CallTrace:
    """Run a copy of ``dun`` in evaluation mode, on copies of its inputs, and note what it calls and reads.

    Random states are left as they were.

    Raises:
        LoRunError: the forward fails on ``example_inputs``.

    >>> layer = nn.Linear(2, 2)
    >>> trace_calls(nn.Sequential(layer, nn.ReLU(), layer), (torch.ones(1, 2),)).num_calls("0")
    2
    """
    network = copy_network(dun).eval()
    # Paired by name: a module object under several names is one object in the copy too.
    originals = {id(network.get_submodule(name)): id(module) for name, module in dun.named_modules()}
    calls: dict[int, list[Call]] = {}
    open_calls: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
    threads: set[int] = set()
    clock = itertools.count()
    reads = ReadTrace(clock)

    def begin(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        threads.add(threading.get_ident())
        taken = tensors_in([args, kwargs])
        size = tuple(taken[0].shape[-2:]) if taken else ()
        open_calls.setdefault(id(module), []).append((next(clock), size))

    def finish(module: nn.Module, *_: object) -> None:
        start, size = open_calls[id(module)].pop()
        calls.setdefault(originals[id(module)], []).append(Call(start, next(clock), size))

    for module in network.modules():
        module.register_forward_pre_hook(begin, with_kwargs=True)
        module.register_forward_hook(finish)
    try:
        with torch.no_grad(), seeded(0), reads:
            network(*to_device(tuple(example_inputs), device_of(network)))
    except Exception as error:
        raise LoRunError(
            f"{type(dun).__name__} cannot run on its example inputs ({type(error).__name__}: {error}): pass the "
            "arguments of its forward in example_inputs=, or in each batch of calibration="
            f"{hint_on_arguments(dun, example_inputs)}"
        ) from error
    in_order = {module: sorted(found, key=lambda call: call.start) for module, found in calls.items()}
    return CallTrace(dun, in_order, reads if threads == {threading.get_ident()} else None)  # it sees this thread only


def _by_number(locations: list[Location]) -> list[Location]:
    """Sort locations whose names differ in one number by it; leave others as they are."""
    parts = [re.split(r"(\d+)", path) for path, _ in locations]
    if len(set(map(len, parts))) != 1:
        return locations
    differing = [i for i, column in enumerate(zip(*parts)) if len(set(column)) > 1]
    if len(differing) != 1 or not all(row[differing[0]].isdigit() for row in parts):
        return locations
    return [location for location, _ in sorted(zip(locations, parts), key=lambda pair: int(pair[1][differing[0]]))]

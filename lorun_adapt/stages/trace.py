"""Run a network once and note which modules are called, how often, in which order and on what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import LoRunError
from ..util.copying import copy_network
from ..util.modules import hint_on_arguments
from ..util.nested import tensors_in
from .locations import Location

PLAIN = (type(None), bool, int, float, str)  # arguments that hold no measurements


@dataclass(frozen=True)
class Call:
    """A call of a module.

    Attributes:
        position: among all calls of the forward.
        size: the last two dimensions of the first tensor that it took, if it took one.
        makers: if it took nothing but one tensor, straight from other modules, the ids of these.
    """

    position: int
    size: tuple[int, ...]
    makers: frozenset[int]


class CallTrace:
    """The calls of the modules of ``dun`` in one forward; empty where nothing was run.

    Args:
        dun: the network.
        calls: by the id of a module, its calls.
    """

    def __init__(self, dun: nn.Module, calls: Mapping[int, Sequence[Call]]) -> None:
        self._dun = dun
        self._calls = calls

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
        """Return ``locations`` in the order in which they run, or unchanged where that is not known."""
        found = self._found(locations)
        if found is None:
            return locations
        return [location for location, _ in sorted(zip(locations, found), key=lambda pair: pair[1].position)]

    def are_layers(self, locations: Sequence[Location]) -> bool:
        """Whether each of ``locations`` takes nothing but what the one before it returned: no measurements come in."""
        found = self._found(locations) or ()
        modules = [id(self._dun.get_submodule(path)) for path, _ in locations]
        return len(found) > 1 and all(module in call.makers for module, call in zip(modules, found[1:]))

    def shrink(self, locations: Sequence[Location]) -> bool:
        """Whether a later one of ``locations`` runs on smaller images than an earlier one, as in an encoder."""
        sizes = [call.size for call in self._found(locations) or ()]
        return any(len(a) == len(b) == 2 and a[0] >= b[0] and a[1] >= b[1] and a != b for a, b in zip(sizes, sizes[1:]))

    def changes_size(self, locations: Sequence[Location]) -> bool:
        """Whether ``locations`` run on images of several sizes."""
        return len({call.size for call in self._found(locations) or ()}) > 1

    def _found(self, locations: Sequence[Location]) -> list[Call] | None:
        """The calls of ``locations``, of a list that of its first item; None where one of them was not called."""
        calls = [self._calls_of(path) or self._calls_of_first_item(path) for path, _ in locations]
        if not all(len(found) > (call or 0) for found, (_, call) in zip(calls, locations)):
            return None
        return [found[call or 0] for found, (_, call) in zip(calls, locations)]

    def _calls_of_first_item(self, path: str) -> Sequence[Call]:
        module = self._dun.get_submodule(path)
        return next((self._calls[id(inner)] for inner in module.modules() if id(inner) in self._calls), ())


def trace_calls(dun: nn.Module, example_inputs: Sequence[object]) -> CallTrace:
    """Run a copy of ``dun`` in evaluation mode and note the calls; the caller's random state is left as it was.

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
    clock = iter(range(1 << 62))
    makers_of = WeakIdKeyDictionary()  # by tensor: its version, and the modules that returned it in this version

    def makers_in(tensor: Tensor) -> frozenset[int]:
        version, makers = makers_of.get(tensor, (None, frozenset()))
        return makers if version == tensor._version else frozenset()  # a data step may work in place

    def note(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        taken = tensors_in([args, kwargs])
        given = [value for value in (*args, *kwargs.values()) if not isinstance(value, PLAIN)]
        makers = makers_in(taken[0]) if len(given) == len(taken) == 1 else frozenset[int]()
        size = tuple(taken[0].shape[-2:]) if taken else ()
        calls.setdefault(originals[id(module)], []).append(Call(next(clock), size, makers))

    def mark(module: nn.Module, _: object, output: object) -> None:
        for tensor in tensors_in(output):
            makers_of[tensor] = tensor._version, makers_in(tensor) | {originals[id(module)]}

    for module in network.modules():
        module.register_forward_pre_hook(note, with_kwargs=True)
        module.register_forward_hook(mark)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            network(*example_inputs)
    except Exception as error:
        raise LoRunError(
            f"{type(dun).__name__} cannot run on its example inputs ({type(error).__name__}: {error}): pass the "
            "arguments of its forward in example_inputs=, or in each batch of calibration="
            f"{hint_on_arguments(dun, example_inputs)}"
        ) from error
    return CallTrace(dun, calls)

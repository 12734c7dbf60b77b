"""Run a network once and note which modules are called, how often and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import LoRunError
from ..util.copying import copy_network
from .locations import Location


class CallTrace:
    """The calls of the modules of ``dun`` in one forward; empty where nothing was run.

    Args:
        dun: the network.
        calls: by the id of a module, the positions of its calls among all calls of the forward.
    """

    def __init__(self, dun: nn.Module, calls: Mapping[int, Sequence[int]]) -> None:
        self._dun = dun
        self._calls = calls

    def _calls_of(self, path: str) -> Sequence[int]:
        return self._calls.get(id(self._dun.get_submodule(path)), ())

    @property
    def is_empty(self) -> bool:
        return not self._calls

    def num_calls(self, path: str) -> int:
        return len(self._calls_of(path))

    def in_order(self, locations: list[Location]) -> list[Location]:
        """Return ``locations`` in the order in which they run, or unchanged where that is not known."""
        if not all(self.num_calls(path) > (call or 0) for path, call in locations):
            return locations
        return sorted(locations, key=lambda location: self._calls_of(location[0])[location[1] or 0])


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
    calls: dict[int, list[int]] = {}
    clock = iter(range(1 << 62))

    def note(module: nn.Module, *_: object) -> None:
        calls.setdefault(originals[id(module)], []).append(next(clock))

    for module in network.modules():
        module.register_forward_pre_hook(note)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            network(*example_inputs)
    except Exception as error:
        raise LoRunError(
            f"{type(dun).__name__} cannot run on example_inputs: {type(error).__name__}: {error}; pass the arguments "
            "of its forward as a tuple"
        ) from error
    return CallTrace(dun, calls)

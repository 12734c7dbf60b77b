"""Run a network once and note which modules are called, how often and in which order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import LoRunError
from ..util.modules import copy_network


class Trace:
    """The calls of one forward; empty where nothing was run."""

    def __init__(self, dun: nn.Module, events: Mapping[int, Sequence[int]]) -> None:
        self._dun = dun
        self._events = events  # module -> positions of its calls in the forward

    def _calls(self, path: str) -> Sequence[int]:
        return self._events.get(id(self._dun.get_submodule(path)), ())

    @property
    def ran(self) -> bool:
        return bool(self._events)

    def count(self, path: str) -> int:
        return len(self._calls(path))

    def in_order(self, sites: list[tuple[str, int | None]]) -> list[tuple[str, int | None]]:
        """The sites in the order in which they run; as they are where that is not known."""
        if not all(self.count(path) > (call or 0) for path, call in sites):
            return sites
        return sorted(sites, key=lambda site: self._calls(site[0])[site[1] or 0])


def trace_calls(dun: nn.Module, example_inputs: Sequence[object]) -> Trace:
    """Run a copy of ``dun`` in evaluation mode, with the caller's random state left as it was."""
    twin = copy_network(dun).eval()
    # Paired by name: a module object that stands under several names is one object in the copy too.
    originals = {id(twin.get_submodule(name)): id(module) for name, module in dun.named_modules()}
    events: dict[int, list[int]] = {}
    clock = iter(range(1 << 62))

    def note(module: nn.Module, *_: object) -> None:
        events.setdefault(originals[id(module)], []).append(next(clock))

    for module in twin.modules():
        module.register_forward_pre_hook(note)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            twin(*example_inputs)
    except Exception as error:
        raise LoRunError(
            f"expected {type(dun).__name__} to run on example_inputs, found {type(error).__name__}: {error}; pass the "
            "arguments of its forward as a tuple"
        ) from error
    return Trace(dun, events)

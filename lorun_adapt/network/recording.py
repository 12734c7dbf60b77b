"""Record what the stages of a network take and return in a forward, so that each can be run again by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..stages.stage_map import Site, StageMap
from ..util.copying import copy_network
from ..util.energy import TINY, energy, relative_error, squared_distance
from ..util.nested import map_tensors, tensors_in
from ..util.seeds import seeded
from .batches import Batch
from .calls import Called
from .observe import Observer

SAME = 1e-8  # squared relative error up to which two outputs count as the same
LEAST_CHANGE = 1e-6  # of an output's energy: what a stage is taken to change at least


@dataclass(frozen=True)
class StageCall:
    """One call of a stage's denoiser in a forward.

    Attributes:
        site: which denoiser.
        arguments, keywords: what it was called with.
        outputs: the tensors that it passes on to later stages.
        changes: for each of these, the energy of its difference from the input; the energy of the output itself where
            no input has its shape.
    """

    site: Site
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    outputs: list[Tensor]
    changes: list[float]


class Recorder:
    """Records the calls of a network's stages, and runs single stages of networks of the same structure.

    A stage can run alone if it returns the same again for the same arguments. One that keeps a state between calls, or
    draws random numbers, does not. A group of which any stage cannot run alone is left out.

    Args:
        network: the original network.
        stage_map: the positions of the stages.
        observer: knows which outputs of the stages matter.
        batch: arguments of the forward; what can run alone is tried out on them.

    Attributes:
        sites: the denoisers that can run alone, in the order in which the network calls them; empty if none can.
        numel: how many numbers they pass on, for this batch.
    """

    def __init__(self, network: nn.Module, stage_map: StageMap, observer: Observer, batch: Batch) -> None:
        self._network, self._observer = network, observer
        self._passed_on: dict[Site, list[int]] = {}
        self._sites = _sites_by_module(network, stage_map)
        groups = {site: group.name for site, group in stage_map.sites.items()}
        self.sites: list[Site] = []
        self.numel = 0
        try:
            calls = self._record(network, batch, seed=0)
        except Exception:  # arguments of a kind that cannot be copied
            return
        if sorted(map(str, groups)) == sorted(str(call.site) for call in calls):  # one call each
            trial = copy_network(network)
            left_out = {groups[call.site] for call in calls if not self._runs_alone(trial, call)}
            kept = [call for call in calls if groups[call.site] not in left_out]
            self.sites = [call.site for call in kept]
            self.numel = sum(tensor.numel() for call in kept for tensor in call.outputs)

    def record(self, batch: Batch, seed: int) -> list[StageCall]:
        """Return the calls of the stages that can run alone, in one forward of the network on ``batch``."""
        kept = set(self.sites)
        return [call for call in self._record(self._network, batch, seed) if call.site in kept and call.outputs]

    def run(self, network: nn.Module, call: StageCall) -> list[Tensor]:
        """Return what the stage of ``network`` passes on for the arguments of a recorded call."""
        arguments, keywords = map_tensors((call.arguments, call.keywords), torch.clone)
        output = tensors_in(denoiser_at(network, call.site)(*arguments, **keywords))
        return [output[i] for i in self._passed_on[call.site]]

    def _record(self, network: nn.Module, batch: Batch, seed: int) -> list[StageCall]:
        calls: list[StageCall] = []
        pending: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        count: dict[nn.Module, int] = {}
        copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

        def copy(tensor: Tensor) -> Tensor:
            # One copy of what several stages take, such as measurements; the original is kept so that its id is.
            key = id(tensor), tensor._version
            if key not in copies:
                copies[key] = tensor, tensor.detach().clone()
            return copies[key][1]

        def before(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            pending.append(map_tensors((arguments, keywords), copy))

        def after(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            taken, named = pending.pop()
            sites, index = self._sites[module], count.get(module, 0)
            count[module] = index + 1
            site = sites[min(index, len(sites) - 1)]
            # A batch may run more stages than the first one did.
            kept = next(iter(self._observer.passed_on[len(calls) :]), [])
            self._passed_on[site] = kept
            found = tensors_in(output)
            outputs = [copy(found[i]) for i in kept]
            inputs = tensors_in((taken, named))
            calls.append(StageCall(site, taken, named, outputs, [_change(tensor, inputs) for tensor in outputs]))

        handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in self._sites]
        handles += [module.register_forward_hook(after, with_kwargs=True) for module in self._sites]
        try:
            with torch.no_grad():
                self._observer.run(network, batch, seed)
        finally:
            for handle in handles:
                handle.remove()
        return calls

    def _runs_alone(self, network: nn.Module, call: StageCall) -> bool:
        """Whether the stage returns what it returned in the forward. ``network`` may change its state."""
        try:
            with torch.no_grad(), seeded(1):
                found = self.run(network, call)
        except Exception:  # a stage that needs the forward around it may raise anything
            return False
        return bool(found) and all(
            a.shape == b.shape and bool(relative_error(a, b) <= SAME) for a, b in zip(found, call.outputs)
        )


def denoiser_at(network: nn.Module, site: Site) -> nn.Module:
    """Return the denoiser of one stage; in an assembled network, a looped module has one for each call."""
    module = network.get_submodule(site.module)
    return module.lorun_calls[site.call] if isinstance(module, Called) and site.call is not None else module


def _sites_by_module(network: nn.Module, stage_map: StageMap) -> dict[nn.Module, list[Site]]:
    """Return each stage's module with its sites, in the order of their calls."""
    found: dict[nn.Module, list[Site]] = {}
    for site in stage_map.sites:
        found.setdefault(network.get_submodule(site.module), []).append(site)
    return found


def _change(output: Tensor, inputs: Sequence[Tensor]) -> float:
    """Return the energy of what a stage changes: of the difference between its output and the nearest input."""
    whole = float(energy(output))
    alike = [tensor for tensor in inputs if tensor.shape == output.shape]
    change = min((float(squared_distance(output, tensor)) for tensor in alike), default=whole)
    return max(change, LEAST_CHANGE * whole, TINY)

"""A cache of assembled networks, which makes swapping adapters a single assignment."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

MAX_READY = 32  # networks in the cache; each has its own modules, but shares all tensors

Key = tuple[str, ...]  # the set of each stage


class _Ready:
    """A network and the list of its modules; listing them at each swap would be slow."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        modules = dict(network.named_modules())
        self.names, self.modules = tuple(modules), list(modules.values())

    def copy_modes(self, other: _Ready, default: bool) -> None:
        """Give each module the train/eval mode of its counterpart in ``other``, or ``default`` if it has none."""
        if self.names is other.names:
            modes = [module.training for module in other.modules]
        else:
            known = {name: module.training for name, module in zip(other.names, other.modules)}
            modes = [known.get(name, default) for name in self.names]
        for module, mode in zip(self.modules, modes):
            if module.training is not mode:
                module.training = mode


def take_modes(network: nn.Module, other: nn.Module, default: bool) -> None:
    """Give each module of ``network`` the train/eval mode of its counterpart in ``other``; see ``copy_modes``."""
    _Ready(network).copy_modes(_Ready(other), default)


class ReadyNetworks:
    """The networks for the most recent choices of sets."""

    def __init__(self) -> None:
        self._held: dict[Key, _Ready] = {}

    def __len__(self) -> int:
        return len(self._held)

    def network(self, key: Key, make: Callable[[], nn.Module], running: nn.Module, training: bool) -> nn.Module:
        """Return the network for a choice of sets; make it if it is not in the cache.

        Args:
            key: the set of each stage.
            make: assembles the network.
            running: the current network; the returned one takes its modules' train/eval modes.
            training: the mode of modules that ``running`` does not have.
        """
        ready = self._held.pop(key, None) or self._with_shared_names(_Ready(make()))
        if ready.network is not running:
            now = next((other for other in self._held.values() if other.network is running), None)
            ready.copy_modes(now or _Ready(running), training)
        self._held[key] = ready
        if len(self._held) > MAX_READY:
            del self._held[next(iter(self._held))]
        return ready.network

    def _with_shared_names(self, ready: _Ready) -> _Ready:
        """Replace the tuple of names by an equal one in the cache, so that ``copy_modes`` can compare by identity."""
        ready.names = next((other.names for other in self._held.values() if other.names == ready.names), ready.names)
        return ready

    def forget(self, name: str) -> None:
        """Drop the networks that use a set."""
        for key in [key for key in self._held if name in key]:
            del self._held[key]

    def clear(self) -> None:
        """Drop all networks."""
        self._held.clear()

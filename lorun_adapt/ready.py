"""Networks that are put together and kept, so that a swap between them is one assignment."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

MOST_READY = 32  # networks kept; each has modules of its own, but no tensors

Key = tuple[str, ...]  # a set for each stage


class _Ready:
    """A network, and its modules by name, which take long to list."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.modules = dict(network.named_modules())

    def take_modes(self, other: _Ready, default: bool) -> None:
        """Be in training where ``other`` is."""
        for name, module in self.modules.items():
            mode = other.modules[name].training if name in other.modules else default
            if module.training is not mode:
                module.training = mode


class ReadyNetworks:
    """The networks of the last choices of sets."""

    def __init__(self) -> None:
        self._held: dict[Key, _Ready] = {}

    def __len__(self) -> int:
        return len(self._held)

    def network(self, key: Key, make: Callable[[], nn.Module], running: nn.Module, training: bool) -> nn.Module:
        """The network of a choice, made where there is none yet, in the modes of the one that runs.

        Args:
            training: the mode of modules that this has not.
        """
        ready = self._held.pop(key, None) or _Ready(make())
        if ready.network is not running:
            now = next((other for other in self._held.values() if other.network is running), None)
            ready.take_modes(now or _Ready(running), training)
        self._held[key] = ready
        if len(self._held) > MOST_READY:
            del self._held[next(iter(self._held))]
        return ready.network

    def forget(self, name: str) -> None:
        """Let go of the networks that run with a set."""
        for key in [key for key in self._held if name in key]:
            del self._held[key]

    def clear(self) -> None:
        self._held.clear()

"""Networks that are put together and kept, so that a swap between them is one assignment."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..terms.term import Term

MOST_READY = 32  # networks kept; each has modules of its own, but no tensors

Key = tuple[str, ...]  # a set for each stage


class _Ready:
    """A network, and its modules that have a mode, which take long to list."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        modules = {name: module for name, module in network.named_modules() if not isinstance(module, Term)}
        self.names, self.modules = tuple(modules), list(modules.values())

    def take_modes(self, other: _Ready, default: bool) -> None:
        """Put each module in training where its counterpart in ``other`` is; ``default``: if it has none."""
        if self.names is other.names:
            modes = [module.training for module in other.modules]
        else:
            known = {name: module.training for name, module in zip(other.names, other.modules)}
            modes = [known.get(name, default) for name in self.names]
        for module, mode in zip(self.modules, modes):
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
            training: the mode of modules that ``running`` does not have.
        """
        ready = self._held.pop(key, None) or self._with_shared_names(_Ready(make()))
        if ready.network is not running:
            now = next((other for other in self._held.values() if other.network is running), None)
            ready.take_modes(now or _Ready(running), training)
        self._held[key] = ready
        if len(self._held) > MOST_READY:
            del self._held[next(iter(self._held))]
        return ready.network

    def _with_shared_names(self, ready: _Ready) -> _Ready:
        """The same, with the list of names that it has in common with others, which makes comparing them quick."""
        ready.names = next((other.names for other in self._held.values() if other.names == ready.names), ready.names)
        return ready

    def forget(self, name: str) -> None:
        """Forget the networks that run with a set."""
        for key in [key for key in self._held if name in key]:
            del self._held[key]

    def clear(self) -> None:
        """Forget all networks."""
        self._held.clear()

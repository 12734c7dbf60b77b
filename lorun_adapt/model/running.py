"""The active adapter sets, and the networks assembled for them.

A swap is a single assignment, because networks are cached; a forward that is running during a swap finishes on the
network it started with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ..errors import LoRunError
from .ready import ReadyNetworks

Active = dict[int, str]  # the active set of each stage


class Running:
    """The active set of each stage.

    Attributes:
        active: the set of each stage.
        inference_mode: whether the active sets are frozen.
        merged: whether the network that runs has merged tensors.

    >>> import torch
    >>> from lorun_adapt.model.running import Running
    >>> running = Running(num_stages=2)
    >>> running.active = running.resolve("default")
    >>> running.resolve({1: "sigma25"})
    {0: 'default', 1: 'sigma25'}
    >>> first = running.network(running.active, lambda: torch.nn.Identity(), torch.nn.Identity(), training=False)
    >>> first is running.network(running.active, lambda: torch.nn.Identity(), first, training=False)
    True
    """

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages
        self.active: Active = {}
        self.inference_mode = False
        self.merged = False
        self._ready = ReadyNetworks()

    @property
    def names(self) -> set[str]:
        """The names of the active sets."""
        return set(self.active.values())

    @property
    def common_set(self) -> str | None:
        """The set that is active in all stages; None if the stages run different sets."""
        return next(iter(self.active.values())) if len(self.names) == 1 else None

    def resolve(self, adapter: str | Sequence[str] | Mapping[int, str]) -> Active:
        """Return the set of each stage after a swap.

        Args:
            adapter: the name of a set for all stages, a list of one name, or ``{stage: name}`` for some stages.

        Raises:
            LoRunError: a list of several names, or an unknown stage.
        """
        if isinstance(adapter, str):
            return dict.fromkeys(range(self.num_stages), adapter)
        if isinstance(adapter, Mapping):
            for stage in adapter:
                if stage not in range(self.num_stages):
                    raise LoRunError(
                        f"expected a stage in 0..{self.num_stages - 1}, found {stage!r}: see print(lorun.stage_map)"
                    )
                if not isinstance(adapter[stage], str):
                    raise LoRunError(f"a stage runs one set, not {adapter[stage]!r}: give {{stage: name}}")
            return {**self.active, **adapter}
        if not isinstance(adapter, (list, tuple)) or len(adapter) != 1:
            raise LoRunError(f"a stage runs one set, not {adapter!r}: name one, or give {{stage: name}}")
        return dict.fromkeys(range(self.num_stages), adapter[0])

    def network(
        self, active: Mapping[int, str], make: Callable[[], nn.Module], running: nn.Module, training: bool
    ) -> nn.Module:
        """Return the network for a choice of sets; see :meth:`ReadyNetworks.network`."""
        key = tuple(active[stage] for stage in range(self.num_stages))
        return self._ready.network(key, make, running, training)

    def forget(self, name: str) -> None:
        """Drop the networks that use a set."""
        self._ready.forget(name)

    def clear(self) -> None:
        """Drop all networks."""
        self._ready.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> Running:
        result = Running(self.num_stages)
        result.active, result.inference_mode, result.merged = dict(self.active), self.inference_mode, self.merged
        return result

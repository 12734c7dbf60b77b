"""Which adapter sets run, and the networks that are ready to run.

A swap is one assignment: networks that have run before are kept ready, and a forward that runs meanwhile ends on the
network that it began with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from ..errors import LoRunError
from .ready import ReadyNetworks

Active = dict[int, str]  # the set that each stage runs with


class Running:
    """Which set each stage runs with.

    Attributes:
        active: the set of each stage.
        inference_mode: whether the sets that run are frozen too.

    >>> import torch
    >>> from lorun_adapt.model.running import Running
    >>> running = Running(num_stages=2)
    >>> running.active = running.wanted("default")
    >>> running.wanted({1: "sigma25"})
    {0: 'default', 1: 'sigma25'}
    >>> first = running.network(running.active, lambda: torch.nn.Identity(), torch.nn.Identity(), training=False)
    >>> first is running.network(running.active, lambda: torch.nn.Identity(), first, training=False)
    True
    """

    def __init__(self, num_stages: int) -> None:
        self.num_stages = num_stages
        self.active: Active = {}
        self.inference_mode = False
        self._ready = ReadyNetworks()

    @property
    def names(self) -> set[str]:
        """The sets that run."""
        return set(self.active.values())

    @property
    def everywhere(self) -> str | None:
        """The set that runs in every stage; None where several run."""
        return next(iter(self.active.values())) if len(self.names) == 1 else None

    def wanted(self, adapter: str | Sequence[str] | Mapping[int, str]) -> Active:
        """The set of each stage after a swap.

        Args:
            adapter: the name of a set for every stage, alone or in a list, or names by stage for some.

        Raises:
            LoRunError: several names, or no such stage.
        """
        if isinstance(adapter, str):
            return dict.fromkeys(range(self.num_stages), adapter)
        if isinstance(adapter, Mapping):
            for stage in adapter:
                if stage not in range(self.num_stages):
                    raise LoRunError(
                        f"expected a stage in 0..{self.num_stages - 1}, found {stage!r}: see print(lorun.stage_map)"
                    )
            return {**self.active, **adapter}
        if len(adapter) != 1:
            raise LoRunError(f"a stage runs with one set, not {list(adapter)}: name one, or give {{stage: name}}")
        return dict.fromkeys(range(self.num_stages), adapter[0])

    def network(
        self, active: Mapping[int, str], make: Callable[[], nn.Module], running: nn.Module, training: bool
    ) -> nn.Module:
        """The network of a choice of sets: kept, or made now. Its modules have the modes of those of ``running``."""
        key = tuple(active[stage] for stage in range(self.num_stages))
        return self._ready.network(key, make, running, training)

    def forget(self, name: str) -> None:
        """Forget the networks that run with a set."""
        self._ready.forget(name)

    def clear(self) -> None:
        """Forget all networks."""
        self._ready.clear()

    def __deepcopy__(self, memo: dict[int, object]) -> Running:
        result = Running(self.num_stages)
        result.active, result.inference_mode = dict(self.active), self.inference_mode
        return result

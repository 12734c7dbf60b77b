"""Choose adapter sets by noise level, and set noise schedules in networks."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import LoRunError
from ..network.converted import AdapterInfo
from ..network.noise import Noise, at_stage, between, is_sigma
from ..network.schedule import apply_schedule
from ..util.fingerprint import versions_of


class NoiseChoice:
    """Chooses adapter sets by noise level, and sets noise schedules in networks.

    Attributes:
        task: a task, or any object with its functions ``schedule`` and ``noise_level``; either may be missing.

    >>> from lorun_adapt import AdapterInfo
    >>> from lorun_adapt.model.noise_choice import NoiseChoice
    >>> infos = {"low": AdapterInfo(sigma=10.0), "high": AdapterInfo(sigma=50.0)}
    >>> NoiseChoice().weights(20.0, infos)
    {'low': 0.75, 'high': 0.25}
    """

    def __init__(self, task: Any = None) -> None:
        self.task = task
        self._interpolated_from: tuple[object, Sequence[Tensor]] = (None, [])

    def estimate(self, sigma: float | str, arguments: Sequence[Any]) -> float:
        """Return a noise level as a number; for ``"auto"``, the task estimates it from the arguments of a forward.

        Raises:
            LoRunError: ``"auto"`` without arguments or without a task that has ``noise_level``; arguments without
                ``"auto"``; a negative sigma.
        """
        if sigma == "auto":
            noise_level = getattr(self.task, "noise_level", None)
            if noise_level is None:
                raise LoRunError(
                    "cannot estimate the noise without noise_level(args) of a task: set lorun.task to a task that has "
                    "it, or give sigma as a number"
                )
            if not arguments:
                raise LoRunError(
                    "cannot estimate the noise without the arguments of a forward: call "
                    'select_adapter("auto", *arguments)'
                )
            sigma = float(noise_level(tuple(arguments)))
        elif arguments:
            raise LoRunError(f"the sigma {sigma!r} takes no further arguments, only 'auto' does: leave them out")
        _check_sigma(sigma)
        return float(sigma)

    def weights(
        self, sigma: float, infos: Mapping[str, AdapterInfo], among: Iterable[str] | None = None
    ) -> dict[str, float]:
        """Return the weights of the sets that together stand for a noise level.

        Args:
            sigma: standard deviation of the noise, on a scale of 0 to 255.
            infos: the noise levels of the sets, by name.
            among: names of the sets to choose from; by default all.

        Raises:
            LoRunError: no set with a known sigma; a sigma that is no number of 0 or more.
        """
        _check_sigma(sigma)
        names = list(infos if among is None else among)
        levels = {name: level for name in names if name in infos and (level := infos[name].sigma) is not None}
        if not levels:
            raise LoRunError(f"none of the sets {names} has a known sigma: give them one with set_noise")
        return between(sigma, levels)

    def is_interpolated(self, recipe: object, tensors: Sequence[Tensor]) -> bool:
        """Whether the interpolated set is up to date: same recipe, and the same tensors with the same values."""
        before = self._interpolated_from
        return (recipe, versions_of(tensors)) == before[0] and all(map(operator.is_, tensors, before[1]))

    def note_interpolated(self, recipe: object, tensors: Sequence[Tensor]) -> None:
        """Remember what the interpolated set was made from."""
        # The tensors themselves are kept: otherwise a new tensor could get the id of a deleted one.
        self._interpolated_from = (recipe, versions_of(tensors)), tensors

    def prepare(self, network: nn.Module, noises: Sequence[Noise | None]) -> None:
        """Set the noise schedule in a network, if the task has ``schedule`` and the noise of all stages is known.

        Args:
            network: the network to change.
            noises: for each stage, the noise that its set is for.
        """
        schedule = getattr(self.task, "schedule", None)
        known = [noise for noise in noises if noise is not None]
        if schedule is not None and len(known) == len(noises):
            apply_schedule(network, schedule, [at_stage(noise, stage) for stage, noise in enumerate(known)])

    def __deepcopy__(self, memo: dict[int, object]) -> NoiseChoice:
        return NoiseChoice(self.task)  # a task may be a Python module, which cannot be copied


def _check_sigma(sigma: object) -> None:
    if not is_sigma(sigma):
        raise LoRunError(
            f"expected a sigma of 0 or more, found {sigma!r}: give a standard deviation on a scale of 0 to 255"
        )

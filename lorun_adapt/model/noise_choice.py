"""Which adapter set, or what between sets, is for a noise level."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import LoRunError
from ..network.converted import AdapterInfo
from ..network.noise import Noise, at_stage, between, is_sigma
from ..network.schedule import apply_schedule


class NoiseChoice:
    """Chooses by noise level, and tells networks of the noise.

    Attributes:
        task: a task, or anything else with its functions ``schedule`` and ``noise_level``.

    >>> from lorun_adapt import AdapterInfo
    >>> from lorun_adapt.model.noise_choice import NoiseChoice
    >>> infos = {"low": AdapterInfo(sigma=10.0), "high": AdapterInfo(sigma=50.0)}
    >>> NoiseChoice().weights(20.0, infos)
    {'low': 0.75, 'high': 0.25}
    """

    def __init__(self, task: Any = None) -> None:
        self.task = task
        self._interpolated_of: tuple[object, Sequence[Tensor]] = (None, [])

    def estimate(self, sigma: float | str, arguments: Sequence[Any]) -> float:
        """A noise level as a number; ``"auto"``: what the task's ``noise_level`` makes of a forward's arguments.

        Raises:
            LoRunError: ``"auto"`` without a task that estimates it, or without arguments; no number of 0 or more.
        """
        if sigma == "auto":
            noise_level = getattr(self.task, "noise_level", None)
            if noise_level is None or not arguments:
                lacking = "a task with noise_level(args)" if noise_level is None else "the arguments of a forward"
                raise LoRunError(
                    f"cannot estimate the noise without {lacking}: set lorun.task, and write "
                    'select_adapter("auto", *arguments)'
                )
            sigma = float(noise_level(tuple(arguments)))
        elif arguments:
            raise LoRunError(f"arguments beside the sigma {sigma!r} are for 'auto' only: leave them out")
        if not is_sigma(sigma):
            raise LoRunError(
                f"expected a sigma of 0 or more, found {sigma!r}: give a standard deviation on a scale of 0 to 255"
            )
        return float(sigma)

    def weights(
        self, sigma: float, infos: Mapping[str, AdapterInfo], among: Iterable[str] | None = None
    ) -> dict[str, float]:
        """How much of which set stands for a noise level.

        Args:
            infos: what is known of each set.
            among: sets to choose from; by default all.

        Raises:
            LoRunError: no set whose noise is known as one number.
        """
        names = list(infos if among is None else among)
        levels = {name: level for name in names if name in infos and (level := infos[name].sigma) is not None}
        if not levels:
            raise LoRunError(f"none of the sets {names} has a known sigma: say what they are for with set_noise")
        return between(sigma, levels)

    def is_interpolated(self, made_of: object, tensors: Sequence[Tensor]) -> bool:
        """Whether the interpolated set was made of just that, and of these tensors as they are."""
        before = self._interpolated_of
        return (made_of, _versions(tensors)) == before[0] and all(map(operator.is_, tensors, before[1]))

    def note_interpolated(self, made_of: object, tensors: Sequence[Tensor]) -> None:
        """Note what the interpolated set was made of. The tensors are held, so that no others pass for them."""
        self._interpolated_of = (made_of, _versions(tensors)), tensors

    def prepare(self, network: nn.Module, noises: Sequence[Noise | None]) -> None:
        """Tell a network the noise that its sets are for, where all are known and the task has a use for it.

        Args:
            noises: of the set that each stage runs with.
        """
        schedule = getattr(self.task, "schedule", None)
        known = [noise for noise in noises if noise is not None]
        if schedule is not None and len(known) == len(noises):
            apply_schedule(network, schedule, [at_stage(noise, stage) for stage, noise in enumerate(known)])

    def __deepcopy__(self, memo: dict[int, object]) -> NoiseChoice:
        return NoiseChoice(self.task)  # a module of Python can't be copied


def _versions(tensors: Iterable[Tensor]) -> list[int]:
    return [tensor._version for tensor in tensors]

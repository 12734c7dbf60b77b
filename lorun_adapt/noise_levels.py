"""Which set of adapters is for which noise, and the choice of one for a noise level."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .adapter_sets import AdapterSets
from .errors import LoRunError
from .noise import Measurements, at_stage, between, checked, hand_over, is_sigma

if TYPE_CHECKING:
    from typing_extensions import Self

INTERPOLATED = "interpolated"  # the set that stands for a noise level between those of others


class NoiseLevels(AdapterSets):
    """What of :class:`LoRunModel` knows of noise."""

    _task: Measurements | None = None

    @property
    def task(self) -> Measurements | None:
        """What knows of the measurements: a task, or a module with its functions ``schedule`` and ``noise_level``.

        ``schedule(net, sigmas)`` hands a network the noise schedule of the sets that it runs with, one sigma for each
        stage. ``noise_level(args)`` estimates sigma from the arguments of a forward.
        """
        return self._task

    @task.setter
    def task(self, task: Measurements | None) -> None:
        with self._swapping:
            before, self._task = self._task, task
            try:
                self._assemble_again()
            except BaseException:
                self._task = before
                raise

    def set_noise_schedule(self, adapter_name: str, noise_schedule: float | Sequence[float] | None) -> None:
        """Say which noise a set is for.

        Args:
            noise_schedule: the sigma of the measurements, or one for each stage, on a scale of 0 to 255.

        Raises:
            LoRunError: an unknown set, negative numbers, or not as many as there are stages; nothing changes then.
        """
        with self._swapping:
            if adapter_name not in self.adapters:
                raise LoRunError(
                    f"expected an adapter among {self.adapter_names}, found {adapter_name!r}: load it first"
                )
            noise = None if noise_schedule is None else checked(noise_schedule, len(self.stage_map))
            found = self._set(adapter_name)
            about = dataclasses.replace(found.about, noise_schedule=noise)
            self._put_set(adapter_name, dataclasses.replace(found, about=about))

    def select_adapter(self, sigma: float | str, *arguments: Any) -> str:
        """Run with the set for a noise level: the one for it, or what is between the two around it, or the nearest.

        What is between two sets is their weighted sum, a set of the name ``interpolated``, which the next one replaces.

        Args:
            sigma: noise on the measurements, on a scale of 0 to 255; or ``"auto"``: what ``noise_level`` of the task
                estimates from the arguments of a forward.
            arguments: these, with ``"auto"``.

        Returns:
            The set's name.

        Raises:
            LoRunError: no set whose noise is known, see :meth:`set_noise_schedule`; ``"auto"`` without a task that
                estimates it, or without arguments; a sigma that is none. Nothing changes then.
        """
        sigma = self._estimated(sigma, arguments)
        with self._swapping:
            weights = self.weights_for(sigma)
            if len(weights) == 1:
                name = next(iter(weights))
                if (known := self.set_config[name].sigma) != sigma:
                    warnings.warn(
                        f"no set is for a sigma of {sigma:g}: taking the nearest, {name}, which is for {known:g}",
                        stacklevel=2,
                    )
            else:
                name = INTERPOLATED
                if name not in self.adapters or self.set_config[name].sigma != sigma:
                    self.add_weighted_adapter(list(weights), list(weights.values()), name)
                    self.set_noise_schedule(name, sigma)
            self.set_adapter(name, self._inference_mode)
            return name

    def weights_for(self, sigma: float, among: Iterable[str] | None = None) -> dict[str, float]:
        """How much of which set stands for a noise level; ``among``: sets to choose from, by default all.

        Raises:
            LoRunError: none whose noise is known as one number.
        """
        names = [name for name in self.adapters if name != INTERPOLATED] if among is None else among
        known = {name: self.set_config[name].sigma for name in names if self.set_config[name].sigma is not None}
        if not known:
            raise LoRunError(
                f"expected a set for one known noise level, found none among {list(names)}: say what they are for with "
                "set_noise_schedule"
            )
        return between(sigma, known)

    def _begin_set(self, name: str, start_from: Sequence[str], noise_schedule: float | Sequence[float] | None) -> None:
        """Make a set that begins as another, or between several, and is for that noise."""
        noise = None if noise_schedule is None else checked(noise_schedule, len(self.stage_map))
        weights = dict.fromkeys(start_from, 1 / max(len(start_from), 1))
        if isinstance(noise, float) and all(
            n in self.adapters and self.set_config[n].sigma is not None for n in weights
        ):
            weights = self.weights_for(noise, start_from) if weights else weights
        if len(weights) == 1:
            self.copy_adapter(next(iter(weights)), name)
        else:
            self.add_weighted_adapter(list(weights), list(weights.values()), name)
        self.set_noise_schedule(name, noise)

    def _estimated(self, sigma: float | str, arguments: tuple[Any, ...]) -> float:
        if sigma == "auto":
            estimate = getattr(self._task, "noise_level", None)
            if estimate is None or not arguments:
                lacking = "a task with noise_level(args)" if estimate is None else "the arguments of a forward"
                raise LoRunError(
                    f"expected {lacking} to estimate the noise by, found none: set lorun.task, and write "
                    'select_adapter("auto", *arguments)'
                )
            sigma = float(estimate(arguments))
        elif arguments:
            raise LoRunError(f"expected a sigma alone, found arguments beside {sigma!r}: these are for 'auto'")
        if not is_sigma(sigma):
            raise LoRunError(
                f"expected a sigma of 0 or more, found {sigma!r}: give a standard deviation on a scale of 0 to 255"
            )
        return float(sigma)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self._task)] = self._task  # a module of Python can't be copied
        return super().__deepcopy__(memo)

    # --- within ----------------------------------------------------------------------------------

    def _assembled(self, active: Mapping[int, str]) -> nn.Module:
        network = super()._assembled(active)
        self._hand_over(network, active)
        return network

    def _hand_over(self, network: nn.Module, active: Mapping[int, str]) -> None:
        """Tell the network of the noise that the sets are for, where all say so and the task has a use for it."""
        noises = [self.set_config[active[stage]].noise_schedule for stage in range(len(self.stage_map))]
        schedule = getattr(self._task, "schedule", None)
        if schedule is not None and None not in noises:
            hand_over(network, schedule, [at_stage(noise, stage) for stage, noise in enumerate(noises)])

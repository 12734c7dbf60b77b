"""Which set of adapters is for which noise, and the choice of one for a noise level."""

from __future__ import annotations

import dataclasses
import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..errors import LoRunError
from ..network.converted import AdapterInfo
from ..network.noise import as_noise, at_stage, between, is_sigma
from ..network.schedule import apply_schedule
from .adapter_sets import AdapterSets
from .combine import weighted_set

if TYPE_CHECKING:
    from typing_extensions import Self

INTERPOLATED = "interpolated"  # the set that stands for a noise level between those of others


class NoiseLevels(AdapterSets):
    """What of :class:`LoRunModel` knows of noise."""

    _task: Any = None
    _interpolated_of: tuple[Any, list[Tensor]] = (None, [])  # what the set of that name was made of

    @property
    def task(self) -> Any:
        """What knows of the measurements: a task, or anything else with its functions ``schedule`` and ``noise_level``.

        Either may be missing. ``schedule(net, sigmas)`` hands a network the noise schedule of the sets that it runs
        with, one sigma for each stage. ``noise_level(args)`` estimates sigma from the arguments of a forward. Both on a
        scale of 0 to 255.
        """
        return self._task

    @task.setter
    def task(self, task: Any) -> None:
        with self._swapping:
            before = self._task
            self.__dict__["_task"] = task  # past nn.Module.__setattr__: a module is not to be trained, moved or saved
            try:
                self._assemble_again()
            except BaseException:
                self.__dict__["_task"] = before
                raise

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "task":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

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
            noise = None if noise_schedule is None else as_noise(noise_schedule, len(self.stage_map))
            held = self._held(adapter_name)
            self._run_with(adapter_name, held._replace(info=dataclasses.replace(held.info, noise_schedule=noise)))

    @contextmanager
    def assume_noise(self, sigma: float) -> Iterator[None]:
        """Within it, sets that run and whose noise is not known are for ``sigma``."""
        unknown = [
            name for name in set(self.active_adapters.values()) if self.adapter_info[name].noise_schedule is None
        ]
        for name in unknown:
            self.set_noise_schedule(name, sigma)
        try:
            yield
        finally:
            for name in unknown:
                self.set_noise_schedule(name, None)

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
                if (known := self.adapter_info[name].sigma) != sigma:
                    warnings.warn(
                        f"no set is for a sigma of {sigma:g}: taking the nearest, {name}, which is for {known:g}",
                        stacklevel=2,
                    )
            else:
                name = INTERPOLATED
                before = self._held(name)
                self._interpolate(weights, sigma)
            try:
                self.set_adapter(name, self._inference_mode)
            except BaseException:
                if name == INTERPOLATED and before is None:
                    self.delete_adapter(name)
                raise
            return name

    def _interpolate(self, weights: Mapping[str, float], sigma: float) -> None:
        """Make the set between others, where it is not there yet."""
        sets = [held[name] for name in weights for held in (self.adapters, self.outside) if name in held]
        tensors = [tensor for held in sets for tensor in held.parameters()]
        made_of = (sigma, dict(weights), [tensor._version for tensor in tensors])
        known, before = self._interpolated_of
        # The tensors are held, so that no others can be taken for them.
        alike = known == made_of and all(map(operator.is_, tensors, before))
        if INTERPOLATED not in self.adapters or not alike:
            found = weighted_set(self, list(weights), list(weights.values()))
            self._put_set(INTERPOLATED, dataclasses.replace(found, info=AdapterInfo(sigma)))
            self._interpolated_of = made_of, tensors

    def weights_for(self, sigma: float, among: Iterable[str] | None = None) -> dict[str, float]:
        """How much of which set stands for a noise level; ``among``: sets to choose from, by default all.

        Raises:
            LoRunError: none whose noise is known as one number.
        """
        names = [name for name in self.adapters if name != INTERPOLATED] if among is None else list(among)
        known = {name: self.adapter_info[name].sigma for name in names if name in self.adapters}
        known = {name: level for name, level in known.items() if level is not None}
        if not known:
            raise LoRunError(
                f"expected a set for one known noise level, found none among {list(names)}: say what they are for with "
                "set_noise_schedule"
            )
        return between(sigma, known)

    def _begin_set(self, name: str, start_from: Sequence[str], noise_schedule: float | Sequence[float] | None) -> None:
        """Make a set that begins as another, or between several, and is for that noise."""
        noise = None if noise_schedule is None else as_noise(noise_schedule, len(self.stage_map))
        if len(set(start_from)) < len(start_from):
            raise LoRunError(f"expected each set to start from once, found {list(start_from)}: leave out what is twice")
        weights = dict.fromkeys(start_from, 1 / max(len(start_from), 1))
        known = all(start in self.adapters and self.adapter_info[start].sigma is not None for start in start_from)
        if start_from and known and isinstance(noise, float):
            weights = self.weights_for(noise, start_from)
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
        self._apply_schedule(network, active)
        return network

    def _apply_schedule(self, network: nn.Module, active: Mapping[int, str]) -> None:
        """Tell the network of the noise that the sets are for, where all say so and the task has a use for it."""
        noises = [self.adapter_info[active[stage]].noise_schedule for stage in range(len(self.stage_map))]
        schedule = getattr(self._task, "schedule", None)
        if schedule is not None and None not in noises:
            apply_schedule(network, schedule, [at_stage(noise, stage) for stage, noise in enumerate(noises)])

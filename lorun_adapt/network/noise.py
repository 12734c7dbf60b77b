"""The noise that a set of adapters is for: one sigma of the measurements, or one for each stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real

from ..errors import LoRunError

Noise = float | tuple[float, ...]  # standard deviation on a scale of 0 to 255
HIGHEST = 1e6


def checked(noise: float | Sequence[float], stages: int) -> Noise:
    """A noise schedule that has the right form.

    Raises:
        LoRunError: numbers below 0 or not finite, or as many as there are no stages.
    """
    noise = noise.tolist() if hasattr(noise, "tolist") else noise  # of torch or numpy
    several = isinstance(noise, Sequence) and not isinstance(noise, str)
    numbers = list(noise) if several else [noise]
    if (several and len(numbers) != stages) or not all(map(is_sigma, numbers)):
        raise LoRunError(
            f"expected one sigma of 0 or more for the measurements, or {stages}, one for each stage, found {noise!r}: "
            "give standard deviations on a scale of 0 to 255"
        )
    return tuple(map(float, numbers)) if several else float(numbers[0])


def noise_of(sigma: float | None, noise_schedule: Sequence[float] | None, num_stages: int) -> Noise | None:
    """The noise that a caller names as one sigma, or as one for each stage; None for neither.

    Raises:
        LoRunError: both, one where several are expected, or what :func:`checked` refuses.

    >>> from lorun_adapt.network.noise import noise_of
    >>> noise_of(None, [30, 20, 10], num_stages=3)
    (30.0, 20.0, 10.0)
    """
    if sigma is not None and noise_schedule is not None:
        raise LoRunError("give either sigma or noise_schedule, not both: a schedule says the noise of every stage")
    if noise_schedule is not None and (isinstance(noise_schedule, (str, Real)) or not hasattr(noise_schedule, "__len__")):
        raise LoRunError(
            f"expected noise_schedule to be a sequence of {num_stages} numbers, found {noise_schedule!r}: give one number "
            "as sigma"
        )
    if sigma is not None and (isinstance(sigma, str) or hasattr(sigma, "__len__")):
        raise LoRunError(f"expected sigma to be one number, found {sigma!r}: give one for each stage as noise_schedule")
    noise = sigma if noise_schedule is None else noise_schedule
    return None if noise is None else checked(noise, num_stages)


def is_sigma(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= value <= HIGHEST


def at_stage(noise: Noise, stage: int) -> float:
    return noise if isinstance(noise, float) else noise[stage]


def between(sigma: float, known: Mapping[str, float]) -> dict[str, float]:
    """How much of which set stands for ``sigma``: the set for it, or the two around it, or the nearest.

    Args:
        known: the sigma of each set.
    """
    below = max((item for item in known.items() if item[1] <= sigma), key=lambda item: item[1], default=None)
    above = min((item for item in known.items() if item[1] >= sigma), key=lambda item: item[1], default=None)
    if below is None or above is None or below[1] == above[1]:
        return {name: 1.0 for name, _ in [below or above] if name}  # type: ignore[misc]
    share = (sigma - below[1]) / (above[1] - below[1])
    return {below[0]: 1 - share, above[0]: share}


def mixed(noises: Sequence[Noise | None], weights: Sequence[float]) -> Noise | None:
    """The noise that a weighted sum of sets stands for, where that can be said."""
    known = [noise for noise in noises if noise is not None]
    lengths = {len(noise) if isinstance(noise, tuple) else 0 for noise in known}
    if len(known) < len(noises) or len(lengths) != 1 or min(weights) < 0 or not math.isclose(sum(weights), 1):
        return None
    if lengths == {0}:
        return float(sum(weight * noise for weight, noise in zip(weights, known)))  # type: ignore[operator]
    return tuple(float(sum(w * n for w, n in zip(weights, stage))) for stage in zip(*known))  # type: ignore[arg-type]

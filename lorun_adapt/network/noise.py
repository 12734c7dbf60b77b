"""The noise level that an adapter set is for: one sigma of the measurements, or a sigma for each stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import numpy as np

from ..errors import LoRunError
from ..util.numbers import is_number

Noise = float | tuple[float, ...]  # standard deviation on a scale of 0 to 255
HIGHEST_SIGMA = 1e6


def as_noise(noise: object, num_stages: int) -> Noise:
    """Check a sigma or a noise schedule, and return it as a float or a tuple of floats.

    >>> as_noise(25, num_stages=3), as_noise([30, 20, 10], num_stages=3)
    (25.0, (30.0, 20.0, 10.0))

    Args:
        noise: a number, or a sequence, array or tensor with a number for each stage.

    Raises:
        LoRunError: a sigma is no number of 0 or more, or there is not one for each stage.
    """
    values = noise.tolist() if hasattr(noise, "tolist") else noise  # of torch or numpy
    if is_sigma(values):
        return float(values)
    if isinstance(values, Sequence) and len(values) == num_stages and all(map(is_sigma, values)):
        return tuple(map(float, values))
    raise LoRunError(
        f"expected one sigma of 0 or more for the measurements, or {num_stages}, one for each stage, found {values!r}: "
        "give standard deviations on a scale of 0 to 255"
    )


def noise_of(sigma: float | None, noise_schedule: Sequence[float] | None, num_stages: int) -> Noise | None:
    """The noise that a caller names as one sigma, or as a schedule with one for each stage; None for neither.

    >>> noise_of(None, [30, 20, 10], num_stages=3)
    (30.0, 20.0, 10.0)

    Raises:
        LoRunError: both, one number where several are expected or the reverse, or what :func:`as_noise` refuses.
    """
    if sigma is not None and noise_schedule is not None:
        raise LoRunError("give either sigma or noise_schedule, not both: a schedule says the noise of every stage")
    if sigma is None and noise_schedule is None:
        return None
    noise = as_noise(sigma if noise_schedule is None else noise_schedule, num_stages)
    if isinstance(noise, float) != (noise_schedule is None):
        given, other = ("sigma", "noise_schedule") if noise_schedule is None else ("noise_schedule", "sigma")
        raise LoRunError(
            f"expected one number as sigma, or a sequence of {num_stages} as noise_schedule, found {noise!r} as "
            f"{given}: pass it as {other}="
        )
    return noise


def is_sigma(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number of 0 or more, Python's or numpy's."""
    return (is_number(value) or isinstance(value, (np.floating, np.integer))) and bool(0 <= value <= HIGHEST_SIGMA)


def at_stage(noise: Noise, stage: int) -> float:
    """The sigma of a stage."""
    return noise if isinstance(noise, float) else noise[stage]


def between(sigma: float, known: Mapping[str, float]) -> dict[str, float]:
    """The weights of the adapter sets that stand for ``sigma``.

    These are the set for just this sigma, or the two sets around it, or the nearest one.

    >>> known = {"low": 10.0, "high": 50.0}
    >>> between(20.0, known), between(50.0, known), between(5.0, known)
    ({'low': 0.75, 'high': 0.25}, {'high': 1.0}, {'low': 1.0})

    Args:
        known: the sigma of each set; at least one.
    """
    below = max((item for item in known.items() if item[1] <= sigma), key=lambda item: item[1], default=None)
    above = min((item for item in known.items() if item[1] >= sigma), key=lambda item: item[1], default=None)
    if below is None or above is None or below[1] == above[1]:
        nearest = below or above
        return {} if nearest is None else {nearest[0]: 1.0}
    share = (sigma - below[1]) / (above[1] - below[1])
    return {below[0]: 1 - share, above[0]: share}


def mixed(noises: Sequence[Noise | None], weights: Sequence[float]) -> Noise | None:
    """The noise that a weighted sum of adapter sets is for.

    It is None (unknown) if a weight is negative, the weights do not sum to 1, the noise of a set is unknown, or some
    sets have a sigma and others a schedule.

    >>> mixed([10.0, 50.0], [0.25, 0.75]), mixed([(0.0, 10.0), (10.0, 30.0)], [0.5, 0.5])
    (40.0, (5.0, 20.0))
    >>> mixed([10.0, None], [0.5, 0.5])
    """
    if not weights or min(weights) < 0 or not math.isclose(sum(weights), 1):
        return None
    sigmas = [noise for noise in noises if isinstance(noise, float)]
    schedules = [noise for noise in noises if isinstance(noise, tuple)]
    if len(sigmas) == len(noises):
        return float(sum(weight * sigma for weight, sigma in zip(weights, sigmas)))
    if len(schedules) == len(noises) and len({len(schedule) for schedule in schedules}) == 1:
        return tuple(float(sum(weight * s for weight, s in zip(weights, stage))) for stage in zip(*schedules))
    return None

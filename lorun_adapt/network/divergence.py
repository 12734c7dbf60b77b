"""Notice a conversion whose output is nowhere near the original's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRunError
from ..stages.stage_map import StageMap
from ..util.copying import copy_network
from ..util.energy import relative_error
from ..util.modules import evaluating
from .batches import Batch, is_finite
from .observe import Observer

FAR = 1.0  # an error as large as the output itself


def warn_if_it_diverges(
    network: nn.Module, original: nn.Module, stage_map: StageMap, inputs: Sequence[Any], advice: str
) -> None:
    """Run a conversion and the original, and warn as :func:`warn_if_far` does.

    The stages of an unfolded iteration pass their errors on, and in many networks these grow from stage to stage.

    Args:
        network: a converted network, assembled.
        original: the network that it was made of.
        stage_map: the positions of the stages of both.
        inputs: the arguments of one forward. If the networks cannot run on them, or they hold NaN, nothing is checked.
        advice: what to do; the end of the warning.
    """
    try:
        factor = error_factor(network, original, stage_map, tuple(inputs)) if is_finite(tuple(inputs)) else 0.0
    except LoRunError:  # the inputs may have served to find the stages only
        return
    warn_if_far(factor, original, advice)


def warn_if_far(factor: float, original: nn.Module, advice: str) -> None:
    """Warn if the output of a conversion is farther from the original's than zero would be.

    Args:
        factor: the norm of the difference, relative to that of the original's output.
        original: the original network.
        advice: what to do; the end of the warning.
    """
    if not factor <= FAR:
        size = f"{factor:,.4g} times as large as the original's output" if math.isfinite(factor) else "NaN or Inf"
        warnings.warn(
            f"the conversion of {type(original).__name__} diverges: its error is {size}; {advice}", stacklevel=4
        )


def error_factor(network: nn.Module, original: nn.Module, stage_map: StageMap, inputs: Batch) -> float:
    """Return the norm of the difference between the networks' outputs, relative to the original's output.

    Raises:
        LoRunError: the original cannot run on ``inputs``, or returns no floating-point tensors.
    """
    original, network = copy_network(original), copy_network(network)  # a forward may change their buffers
    with torch.no_grad(), evaluating(original), evaluating(network):
        observer = Observer(original, stage_map, inputs)
        return factor_between(*(observer.run(net, inputs, 0).final for net in (network, original)))


def factor_between(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Return the norm of the difference from the targets, relative to theirs; the largest where there are several."""
    errors = [relative_error(a, b) for a, b in zip(outputs, targets) if bool(b.any())]
    return math.sqrt(float(torch.stack(errors).max())) if errors else 0.0

"""Notice a conversion whose output is nowhere near the original's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..stages.stage_map import StageMap
from ..util.energy import relative_error
from ..util.modules import copy_network, evaluating
from .batches import Batch
from .observe import Observer

FAR = 1.0  # an error as large as the output itself


def warn_if_far(network: nn.Module, original: nn.Module, inputs: Sequence[Any], advice: str) -> None:
    """Warn if the output of ``network`` is farther from the original's than zero would be.

    The stages of an unfolded iteration pass their errors on, and in many networks these grow from stage to stage.

    Args:
        network: a converted network, assembled.
        original: the network that it was made of.
        inputs: the arguments of one forward.
        advice: what to do; the end of the warning.
    """
    factor = error_factor(network, original, tuple(inputs))
    if not factor <= FAR:
        size = f"{factor:,.3g} times as large as its output" if math.isfinite(factor) else "NaN or Inf"
        warnings.warn(
            f"the conversion of {type(original).__name__} diverges: the error of its output is {size}; {advice}",
            stacklevel=3,
        )


def error_factor(network: nn.Module, original: nn.Module, inputs: Batch) -> float:
    """Return the norm of the difference between the networks' outputs, relative to the original's output."""
    original, network = copy_network(original), copy_network(network)  # a forward may change their buffers
    with torch.no_grad(), evaluating(original), evaluating(network):
        observer = Observer(original, StageMap(type(original).__name__, ()), inputs)
        outputs, targets = (observer.run(net, inputs, 0).final for net in (network, original))
    return math.sqrt(max(float(relative_error(a, b)) for a, b in zip(outputs, targets)))

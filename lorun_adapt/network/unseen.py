"""Notice a network whose code gets at the weights of its stages in a way that adapters do not see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import LoRunError
from ..util.energy import relative_error
from .assemble import assemble, merge
from .converted import Converted
from .outputs import outputs_of

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.complex64: 1e-3, torch.complex128: 1e-3}


def check_adapters_are_seen(converted: Converted, inputs: Sequence[Any]) -> None:
    """Check that the network computes the same with its adapters as with their weights merged into plain tensors.

    An adapted module has the weight in a property and is of a subclass. Code that goes through the parameters of a
    stage, asks for the exact type of a layer, or changes a weight in place would do something else.

    Args:
        converted: the converted network.
        inputs: the arguments of one forward; if the merged network cannot run on them, nothing is checked.

    Raises:
        LoRunError: the outputs differ.
    """
    try:
        merged = outputs_of(merge(converted.base, converted.stage_map, [converted.choice]), inputs)
    except Exception:  # one module for stages that differ cannot be merged, and the user's code may raise anything
        return
    try:
        adapted = outputs_of(assemble(converted.base, converted.stage_map, converted.choice), inputs)
    except Exception as error:
        raise LoRunError(
            f"{converted.stage_map.network} cannot run with adapters, though it can with plain weights "
            f"({type(error).__name__}: {error}): have its stages read their weights as attributes, such as self.weight"
        ) from error
    for ours, plain in zip(adapted, merged):
        limit = TOLERANCE.get(plain.dtype, 0.05)
        difference = float(relative_error(ours, plain)) ** 0.5
        if not bool(plain.isfinite().all()) or difference <= limit:
            continue
        groups = converted.stage_map.groups
        if math.isnan(difference) and any(spec.without_base for group in groups for spec in group.tensors):
            raise LoRunError(
                f"{converted.stage_map.network} passes a weight of its stages to code that cannot use tensors without "
                "a base, such as a function of torch.jit.script or torch.vmap: give rank=, so that all have a base"
            )
        raise LoRunError(
            f"{converted.stage_map.network} computes something else with adapters than with the same weights in "
            f"plain tensors, a difference of {difference:.1%}: its stages must "
            "not list their parameters, ask for the exact type of a layer, or change a weight in place"
        )

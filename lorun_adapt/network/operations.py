"""Count the operations of a forward."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .outputs import outputs_of


class _NoModules(contextlib.nullcontext[None]):
    """In place of what tells modules apart, whose hooks fail where a forward computes gradients."""

    parents = ("Global",)


def count_operations(network: nn.Module, inputs: Sequence[object]) -> int:
    """Return how many floating-point operations the convolutions and matrix products of a forward take.

    As PyTorch's ``FlopCounterMode`` counts them: other operations do not count. Nothing of the network or of the
    inputs changes.

    >>> import torch
    >>> count_operations(nn.Linear(8, 4), [torch.zeros(2, 8)])
    128
    """
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        outputs_of(network, inputs)
    return int(counter.get_total_flops())

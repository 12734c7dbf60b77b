"""Count the operations of a forward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .outputs import outputs_of


def count_operations(network: nn.Module, inputs: Sequence[object]) -> int:
    """Return how many floating-point operations the convolutions and matrix products of a forward take.

    As PyTorch's ``FlopCounterMode`` counts them: other operations do not count. Nothing of the network or of the
    inputs changes.

    >>> count_operations(nn.Linear(8, 4), [torch.zeros(2, 8)])
    128
    """
    with FlopCounterMode(display=False) as counter:
        outputs_of(network, inputs)
    return int(counter.get_total_flops())

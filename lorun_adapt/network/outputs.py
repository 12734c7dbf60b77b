"""What a network returns, with nothing of it or of its inputs changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..util.copying import copy_network
from ..util.modules import evaluating
from ..util.nested import device_of, tensors_in, to_device
from ..util.seeds import seeded


@torch.no_grad()
def outputs_of(network: nn.Module, inputs: Sequence[Any]) -> list[Tensor]:
    """Return the tensors in the output of a copy of ``network``, in evaluation mode, for copies of ``inputs``.

    A forward may change its buffers and its inputs. Random numbers are the same in each call.

    >>> outputs_of(nn.Identity(), (torch.ones(2),))
    [tensor([1., 1.])]
    """
    network = copy_network(network)
    with evaluating(network), seeded(0):
        return tensors_in(network(*to_device(tuple(inputs), device_of(network))))

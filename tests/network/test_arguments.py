"""Which items of a batch are the arguments of a forward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lorun_adapt.network.observe import forward_arguments

Y, MASK, TRUTH = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
PHYSICS = SimpleNamespace(mask=MASK)


class OfDeepinv(nn.Module):
    def forward(self, y, physics, init=None):
        return y


class Plain(nn.Module):
    def forward(self, y, physics):
        return y


@pytest.mark.parametrize("batch", [(Y, PHYSICS), (TRUTH, Y, PHYSICS), (Y, PHYSICS, TRUTH)])
@pytest.mark.parametrize("wrap", [lambda net: net, nn.DataParallel, torch.compile])
def test_deepinv_never_gets_the_truth(batch: tuple[object, ...], wrap) -> None:
    for net in (OfDeepinv(), Plain()):
        assert forward_arguments(wrap(net), batch) == (Y, PHYSICS)


def test_physics_may_be_a_tensor() -> None:
    assert forward_arguments(Plain(), (Y, MASK, TRUTH)) == (Y, MASK)
    assert forward_arguments(Plain(), (Y, MASK)) == (Y, MASK)

"""Values within values."""

from __future__ import annotations

from collections import namedtuple

import torch

from lorun_adapt.util.nested import to_device


def test_arguments_move_recursively() -> None:
    class Physics:
        def to(self, device):
            return ("moved", device)

    Pair = namedtuple("Pair", "a b")
    device = torch.device("meta")
    moved = to_device((Pair(torch.ones(1), 2), {"x": [torch.ones(1), Physics()]}, None, 3.5), device)
    assert moved[0].a.is_meta and moved[0].b == 2 and moved[1]["x"][0].is_meta
    assert moved[1]["x"][1] == ("moved", device) and moved[2:] == (None, 3.5)

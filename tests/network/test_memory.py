"""A conversion keeps no second copy of the stages' tensors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import lorun_adapt

SCRIPT = """
import torch
from torch import nn
import lorun_adapt
import lorun_adapt.util.toy
lorun_adapt.convert(lorun_adapt.util.toy.ToyUnfoldingNet(), rank=1)  # imports what it needs

def memory(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024

def stage():
    return nn.Sequential(nn.Conv2d(1, 128, 3), *[nn.Conv2d(128, 128, 3) for _ in range(9)], nn.Conv2d(128, 1, 3))

torch.set_num_threads(1)
net = nn.ModuleDict({"stages": nn.ModuleList(stage() for _ in range(24))})
size = sum(p.nbytes for p in net.parameters())
before = memory("VmRSS")
lorun = lorun_adapt.convert(net, rank=8)
print((memory("VmHWM") - before) / size)
"""


@pytest.mark.slow
def test_at_most_one_and_a_half_times_the_networks_memory() -> None:
    found = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=120)
    assert float(found.stdout) < 1.5


class HeldOutside(nn.Module):
    """A kernel of the second stage is used outside the stages as well."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(3))
        self.last = nn.Conv2d(8, 8, 3, padding=1)
        self.last.weight = self.stages[1][0].weight

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = x + stage(x).relu()
        return self.last(x)


@pytest.mark.parametrize("rank", [1, 8])
def test_what_is_held_outside_the_stages_too_keeps_its_value(rank: int) -> None:
    torch.manual_seed(0)
    net = HeldOutside()
    lorun = lorun_adapt.convert(net, rank=rank)
    assert torch.equal(lorun.base.last.weight, net.last.weight)
    assert torch.equal(lorun.network.last.weight, net.last.weight)

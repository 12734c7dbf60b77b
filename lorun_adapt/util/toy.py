"""A small unfolding network for examples and documentation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ToyStage(nn.Module):
    """A gradient descent module with a step size of its own, and a denoiser of two convolutions."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(0.5))
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x - self.step * (x - y)
        return x + 0.1 * self.conv2(F.relu(self.conv1(x)))


class ToyUnfoldingNet(nn.Module):
    """Denoises images (B, 1, H, W) in three stages.

    >>> import torch
    >>> from lorun_adapt.util.toy import ToyUnfoldingNet
    >>> ToyUnfoldingNet()(torch.rand(2, 1, 8, 8)).shape
    torch.Size([2, 1, 8, 8])
    """

    def __init__(self, stages: int = 3) -> None:
        super().__init__()
        self.stages = nn.ModuleList([ToyStage() for _ in range(stages)])

    def forward(self, y: Tensor) -> Tensor:
        x = y
        for stage in self.stages:
            x = stage(x, y)
        return x

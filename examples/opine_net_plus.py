"""Task file for the published OPINE-Net+ (Zhang, Zhao and Gao, IEEE JSTSP 2020).

The weights are the authors'. Put them into one folder, and set the environment variable to it:

    export OPINE_NET_PLUS=.../cs10      # net_params_170.pkl
    lorun-adapt inspect examples/opine_net_plus.py

The network learnt its own sampling matrix of signs, which is the hardware of a camera: conversion and recovery leave it
as it is. It takes whole images, and measures each block of 33x33 pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 33
FOLDER = os.environ.get("OPINE_NET_PLUS")

channels = 1
patch = 3 * BLOCK
weights = str(Path(FOLDER, "net_params_170.pkl").resolve()) if FOLDER else None


class Sign(torch.autograd.Function):
    """The sign, 1 for zero, whose gradient is taken to be 1."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return torch.where(values < 0, -1.0, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class BasicBlock(nn.Module):
    """One stage, with the parameter names of the published checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.lambda_step = nn.Parameter(torch.tensor([0.5]))
        self.soft_thr = nn.Parameter(torch.tensor([0.01]))
        self.conv_D = _kernel(32, 1)
        self.conv1_forward = _kernel(32, 32)
        self.conv2_forward = _kernel(32, 32)
        self.conv1_backward = _kernel(32, 32)
        self.conv2_backward = _kernel(32, 32)
        self.conv1_G = _kernel(32, 32)
        self.conv2_G = _kernel(32, 32)
        self.conv3_G = _kernel(1, 32)

    def forward(
        self, x: Tensor, gram: Callable[[Tensor], Tensor], back_projection: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        r = x - self.lambda_step * gram(x) + self.lambda_step * back_projection
        d = _convolve(r, self.conv_D)
        code = _convolve(F.relu(_convolve(d, self.conv1_forward)), self.conv2_forward)
        hidden = F.relu(self._backward(code.sign() * F.relu(code.abs() - self.soft_thr)))
        hidden = _convolve(F.relu(_convolve(hidden, self.conv1_G)), self.conv2_G)
        # The symmetry loss is needed only in training.
        return r + _convolve(hidden, self.conv3_G), self._backward(code) - d if self.training else None

    def _backward(self, code: Tensor) -> Tensor:
        return _convolve(F.relu(_convolve(code, self.conv1_backward)), self.conv2_backward)


class OPINENetPlus(nn.Module):
    """``forward(images)``: (B, 1, H, W), sides multiples of 33 -> images, residuals, sampling matrix (m, 1089)."""

    def __init__(self, stages: int = 9, measurements: int = 109) -> None:
        super().__init__()
        self.Phi = nn.Parameter(nn.init.xavier_normal_(torch.empty(measurements, BLOCK * BLOCK)))
        self.Phi_scale = nn.Parameter(torch.tensor([0.01]))
        self.fcs = nn.ModuleList(BasicBlock() for _ in range(stages))

    def forward(self, images: Tensor) -> list[Any]:
        phi = self.Phi_scale * Sign.apply(self.Phi)
        rows, columns = phi.view(-1, 1, BLOCK, BLOCK), phi.T.reshape(BLOCK * BLOCK, -1, 1, 1)

        def gram(x: Tensor) -> Tensor:
            return F.pixel_shuffle(F.conv2d(F.conv2d(x, rows, stride=BLOCK), columns), BLOCK)

        x = back_projection = gram(images)  # measured, and projected back
        symmetry = []
        for block in self.fcs:
            x, residual = block(x, gram, back_projection)
            symmetry.append(residual)
        return [x, symmetry, phi]


def _kernel(out_channels: int, in_channels: int) -> nn.Parameter:
    return nn.Parameter(nn.init.xavier_normal_(torch.empty(out_channels, in_channels, 3, 3)))


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(x, kernel, padding=1)


def build() -> nn.Module:
    return OPINENetPlus()


def measure(images: Tensor, sigma: float = 0.0) -> tuple[Tensor]:
    if sigma:
        raise ValueError("the network measures the images itself, without noise")
    height, width = images.shape[-2:]
    return (F.pad(images, (0, -width % BLOCK, 0, -height % BLOCK)),)


def restore(output: list[Tensor], images: Tensor) -> Tensor:
    height, width = images.shape[-2:]
    return output[0][..., :height, :width].clamp(0, 1)

"""Task file for the published ISTA-Net+ for MRI (Zhang and Ghanem, arXiv:1706.07929): one coil, real images.

The weights and the mask are the authors'. Put them into one folder, and set the environment variable to it:

    export MRI_ISTA_NET_PLUS=.../mri10      # net_params_200.pkl, mask_10.mat
    lorun-adapt inspect examples/mri_ista_net_plus.py

The network restores whole slices of 256x256 pixels, as the mask says which of their frequencies are measured.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import ista_net_plus
import scipy.io
import torch
from torch import Tensor, nn

FOLDER = os.environ.get("MRI_ISTA_NET_PLUS")

channels = 1
patch = 256
weights = str(Path(FOLDER, "net_params_200.pkl").resolve()) if FOLDER else None


class BasicBlock(ista_net_plus.BasicBlock):
    """One stage: the parameters and the denoiser of ISTA-Net+, with another gradient descent module."""

    def forward(self, x: Tensor, zero_filled: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        r = x - self.lambda_step * measured_and_back(x, mask) + self.lambda_step * zero_filled
        return self.proximal_mapping(r)


class MRIISTANetPlus(nn.Module):
    """``forward(zero_filled, mask)``: slices (B, 1, H, W), mask (H, W) in FFT order -> slices, residuals."""

    def __init__(self, stages: int = 9) -> None:
        super().__init__()
        self.fcs = nn.ModuleList(BasicBlock() for _ in range(stages))

    def forward(self, zero_filled: Tensor, mask: Tensor) -> list[Tensor | list[Tensor | None]]:
        x, symmetry = zero_filled, []
        for block in self.fcs:
            x, residual = block(x, zero_filled, mask)
            symmetry.append(residual)
        return [x, symmetry]


def measured_and_back(images: Tensor, mask: Tensor) -> Tensor:
    """The images from their measured frequencies, all others zero."""
    return torch.fft.ifft2(mask * torch.fft.fft2(images)).real


@functools.cache
def mask() -> Tensor:
    """Which frequencies are measured, (256, 256), ones and zeros in the order of an FFT."""
    if not FOLDER:
        raise RuntimeError("set MRI_ISTA_NET_PLUS to the folder with the authors' weights and mask")
    (path,) = Path(FOLDER).glob("mask_*.mat")
    return torch.from_numpy(scipy.io.loadmat(path)["mask_matrix"]).float()


def build() -> nn.Module:
    return MRIISTANetPlus()


def measure(images: Tensor, sigma: float = 0.0) -> tuple[Tensor, Tensor]:
    noisy = images + sigma / 255 * torch.randn_like(images)  # white noise is white in the frequencies, too
    return measured_and_back(noisy, mask()), mask()


def restore(output: list[Tensor], images: Tensor) -> Tensor:
    return output[0].clamp(0, 1)

"""MRI with one coil, four times faster: deepinv's physics and its unfolded proximal gradient descent.

The scanner reads a quarter of the columns of the Fourier transform of a complex image, or radial lines through its
centre. The network is ``deepinv.optim.PGD(unfold=True)`` with a denoiser for each of its iterations; its step sizes are
trained, too. ``pip install 'lorun-adapt[deepinv]'``.

Images are magnitudes; a smooth random phase makes them complex, as scans are. The environment variables
MRI_ACCELERATION (4 by default) and MRI_PATTERN (``cartesian``, the default, or ``radial``) choose what is read.
"""

from __future__ import annotations

import functools
import math
import os

import deepinv
import numpy as np
import torch
from torch import Tensor, nn

ACCELERATION = int(os.environ.get("MRI_ACCELERATION", "4"))
PATTERN = os.environ.get("MRI_PATTERN", "cartesian")
ITERATIONS = 10
CENTRE = 0.08  # the share of columns in the middle that are always read

channels = 1
patch = 256  # whole slices: a part of one would be read along other lines
weights = "mri.safetensors"
license = "apache-2.0"


@functools.cache
def sampling_mask(height: int, width: int, acceleration: int = ACCELERATION, pattern: str = PATTERN) -> Tensor:
    """What is read, (1, 1, height, width), with the zero frequency in the middle; the same each time."""
    if pattern == "cartesian":
        random = np.random.RandomState(0)  # numpy promises that its stream never changes
        count = max(1, round(width / acceleration))
        centre = min(count, max(1, round(CENTRE * width)))
        first = (width - centre) // 2
        others = [column for column in range(width) if not first <= column < first + centre]
        columns = [*range(first, first + centre), *random.permutation(others)[: count - centre]]
        mask = torch.zeros(height, width)
        mask[:, columns] = 1
        return mask[None, None]
    if pattern != "radial":
        raise ValueError(f"expected 'cartesian' or 'radial' for MRI_PATTERN, found {pattern!r}")
    y, x = torch.meshgrid(torch.arange(height) - height // 2, torch.arange(width) - width // 2, indexing="ij")
    mask, angle = torch.zeros(height, width, dtype=torch.bool), 0.0
    while mask.float().mean() < 1 / acceleration:
        mask |= (x * math.sin(angle) - y * math.cos(angle)).abs() <= 0.5
        angle += math.pi * (math.sqrt(5) - 1) / 2  # the golden angle
    return mask.float()[None, None]


def with_phase(magnitudes: Tensor) -> Tensor:
    """Magnitudes (B, 1, H, W) -> real and imaginary parts (B, 2, H, W), with a smooth random phase."""
    height, width = magnitudes.shape[-2:]
    y, x = torch.linspace(-1, 1, height)[:, None], torch.linspace(-1, 1, width)
    a, b, c, d = (torch.randn(4, len(magnitudes), 1, 1)).unbind(0)
    phase = (a + b * x + c * y + d * x * y).to(magnitudes)[:, None]
    return torch.cat([magnitudes * phase.cos(), magnitudes * phase.sin()], 1)


def build() -> nn.Module:
    from deepinv.optim import PGD
    from deepinv.optim.data_fidelity import L2
    from deepinv.optim.prior import PnP

    denoisers = [deepinv.models.DnCNN(2, 2, depth=6, nf=32, pretrained=None) for _ in range(ITERATIONS)]
    return PGD(
        data_fidelity=L2(),
        prior=[PnP(denoiser) for denoiser in denoisers],
        stepsize=[1.0] * ITERATIONS,
        sigma_denoiser=[0.05] * ITERATIONS,
        max_iter=ITERATIONS,
        unfold=True,
    )


def measure(images: Tensor, sigma: float = 0.0) -> tuple[Tensor, nn.Module]:
    mask = sampling_mask(*images.shape[-2:]).to(images)
    physics = deepinv.physics.MRI(mask=mask, img_size=(2, *images.shape[-2:]), device=images.device)
    y = physics(with_phase(images))
    return y + sigma / 255 * torch.randn_like(y) * mask, physics


def first_estimate(y: Tensor, physics: nn.Module) -> Tensor:
    """The zero-filled image, (B, 2, H, W), that the network starts from."""
    return physics.A_adjoint(y)


def restore(output: Tensor, images: Tensor | None) -> Tensor:
    return output.square().sum(1, keepdim=True).sqrt().clamp(0, 1)

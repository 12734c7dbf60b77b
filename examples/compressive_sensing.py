"""Block compressive sensing at 25 % with nine unfolded iterations of ISTA.

This is the reference network and its task file. The network unfolds nine iterations of ISTA (the
iterative shrinkage-thresholding algorithm) for

    min_x  1/2 ||A x - y||^2 + lambda ||F(x)||_1

where A measures each 33x33 block with the same 272 random vectors. Its stages follow ISTA-Net+
(Zhang and Ghanem, arXiv:1706.07929, equations 10 to 13): a gradient step, then soft-thresholding
between two learned transforms. Unlike there, the transforms see the whole image instead of one
block at a time, so that block borders are restored with their surroundings.

Try it with ``lorun-adapt inspect examples/compressive_sensing.py``. What a task file must define is
described in ``lorun_adapt/guides/your_network.md``.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import chi2
from torch import Tensor, nn

BLOCK = 33
RATIO = 0.25
STAGES = 9
CHANNELS = 32
QUIET = 100  # directions, of 272, in which measurements hold little but noise

channels = 1
patch = 3 * BLOCK
weights = "compressive_sensing.safetensors"
license = "apache-2.0"


@functools.cache
def sampling_matrix() -> Tensor:
    """The 272 orthonormal measurement vectors as rows, shape (272, 1089).

    They are computed, not stored: numpy promises that ``RandomState`` never changes its stream, and
    the signs that a QR decomposition leaves open are fixed here.
    """
    pixels = BLOCK * BLOCK
    gaussian = np.random.RandomState(0).standard_normal((pixels, int(RATIO * pixels)))
    q, r = np.linalg.qr(gaussian)
    return torch.from_numpy((q * np.sign(np.diag(r))).T.copy()).float()


def covariance(correlation: float = 0.9) -> Tensor:
    """The covariance of a block's pixels, (1089, 1089): a first-order Markov process of unknown mean."""
    line = correlation ** (torch.arange(BLOCK)[:, None] - torch.arange(BLOCK)).abs().double()
    return torch.kron(line, line) + 10.0


def linear_estimate(phi: Tensor) -> Tensor:
    """The linear map from measurements to the first estimate, shape (1089, 272).

    It is the minimum-mean-square-error estimate C A^T (A C A^T)^-1.
    """
    phi, c = phi.double(), covariance()
    return (c @ phi.T @ torch.linalg.inv(phi @ c @ phi.T)).float()


@functools.cache
def quiet_directions() -> Tensor:
    """The directions in which measurements of images vary the least, shape (272, QUIET)."""
    phi = sampling_matrix().double()
    return torch.linalg.eigh(phi @ covariance() @ phi.T).eigenvectors[:, :QUIET].float()


class Stage(nn.Module):
    """One ISTA iteration: gradient descent module and proximal mapping module."""

    def __init__(self, width: int = CHANNELS) -> None:
        super().__init__()
        self.step = nn.Parameter(torch.tensor(1.0))
        self.threshold = nn.Parameter(torch.tensor(0.01))
        self.conv_d = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.forward_transform = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )
        self.backward_transform = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )
        self.conv_g = nn.Conv2d(width, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor, y: Tensor, phi: Tensor) -> Tensor:
        r = x - self.step * transpose(measure_blocks(x, phi) - y, phi)
        code = self.forward_transform(self.conv_d(r))
        code = code.sign() * F.relu(code.abs() - self.threshold)
        return r + self.conv_g(self.backward_transform(code))


class UnfoldedISTA(nn.Module):
    """Nine stages, each with its own weights.

    ``forward(y)`` takes measurements of shape (B, 272, H / 33, W / 33) and returns images of
    shape (B, 1, H, W) with values around [0, 1].
    """

    def __init__(self, stages: int = STAGES, width: int = CHANNELS) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(width) for _ in range(stages))
        phi = sampling_matrix()
        self.register_buffer("phi", phi, persistent=False)
        self.register_buffer("initial", linear_estimate(phi), persistent=False)

    def forward(self, y: Tensor) -> Tensor:
        x = transpose(y, self.initial.T)
        for stage in self.stages:
            x = stage(x, y, self.phi)
        return x


def measure_blocks(images: Tensor, phi: Tensor) -> Tensor:
    """A x: (B, 1, H, W) with H and W multiples of 33 -> (B, 272, H / 33, W / 33)."""
    return F.conv2d(F.pixel_unshuffle(images, BLOCK), phi[:, :, None, None])


def transpose(y: Tensor, phi: Tensor) -> Tensor:
    """A^T y: (B, 272, h, w) -> (B, 1, 33 h, 33 w)."""
    return F.pixel_shuffle(F.conv2d(y, phi.T[:, :, None, None]), BLOCK)


def build() -> nn.Module:
    return UnfoldedISTA()


def measure(images: Tensor, sigma: float = 0.0) -> tuple[Tensor]:
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % BLOCK, 0, -height % BLOCK), mode="replicate")
    y = measure_blocks(padded, sampling_matrix().to(images))
    return (y + sigma / 255 * torch.randn_like(y),)


def noise_level(args: tuple[Tensor]) -> float:
    """Sigma, on a scale of 0 to 255, from the smoothest tenth of the blocks."""
    quiet = torch.einsum("bihw,ij->bjhw", args[0], quiet_directions().to(args[0]))
    energy = quiet.square().mean(1).flatten().quantile(0.1)
    return 255 * float(energy / (chi2.ppf(0.1, QUIET) / QUIET)) ** 0.5


def first_estimate(y: Tensor) -> Tensor:
    """The linear estimate that the network starts from: (B, 272, h, w) -> (B, 1, 33 h, 33 w)."""
    return transpose(y, linear_estimate(sampling_matrix()).to(y).T)


def restore(output: Tensor, images: Tensor) -> Tensor:
    return output[..., : images.shape[-2], : images.shape[-1]].clamp(0, 1)

"""Super-resolution of blurred, noisy colour images, by six unfolded iterations with one denoiser for all.

The network unfolds half-quadratic splitting of

    min_x  1/2 ||y - (k * x) down s||^2 + r(x)

with the closed form of the data step in the Fourier domain (Zhao et al., IEEE TIP 2016), as USRNet does (Zhang, Van
Gool and Timofte, arXiv:2003.10428). It has one residual U-Net, which each iteration calls with a noise level of its
own, so its stages share all weights already. Adapters add what they lack: weights of each stage's own.

The scale is 2, or what the environment variable SUPER_RESOLUTION_SCALE says.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALE = int(os.environ.get("SUPER_RESOLUTION_SCALE", "2"))
ITERATIONS = 6
BLUR = 1.0  # pixels of the large image: the standard deviation of the kernel
NOISE_FLOOR = 1.0  # of 255: what a measurement without noise counts as

channels = 3
patch = 24 * SCALE
border = SCALE
weights = "super_resolution.safetensors"  # for a scale of 2
license = "apache-2.0"


def kernel(width: float = BLUR, side: int = 9) -> Tensor:
    """A Gaussian kernel, (1, 1, side, side)."""
    line = torch.exp(-(torch.arange(side) - side // 2).square() / (2 * width**2))
    line = line / line.sum()
    return (line[:, None] * line)[None, None]


def transfer_function(k: Tensor, height: int, width: int) -> Tensor:
    """The Fourier transform of a kernel (1, 1, a, b) that is centred on the first pixel, (1, 1, height, width)."""
    a, b = k.shape[-2:]
    padded = F.pad(k, (0, width - b, 0, height - a))
    return torch.fft.fft2(padded.roll((-(a // 2), -(b // 2)), (-2, -1)))


def degrade(images: Tensor, k: Tensor, scale: int) -> Tensor:
    """Blur, with a circular border, and keep every ``scale``-th pixel."""
    blurred = torch.fft.ifft2(torch.fft.fft2(images) * transfer_function(k, *images.shape[-2:])).real
    return blurred[..., ::scale, ::scale]


def enlarge(y: Tensor, scale: int) -> Tensor:
    """Bicubic interpolation, with the pixels of ``y`` where ``degrade`` took them: (B, C, h, w) -> (B, C, s h, s w)."""
    height, width = (scale * side + 1 for side in y.shape[-2:])
    padded = F.pad(y, (0, 1, 0, 1), mode="replicate")
    return F.interpolate(padded, (height, width), mode="bicubic", align_corners=True)[..., :-1, :-1]


def first_estimate(y: Tensor, k: Tensor, scale: int, sigma: Tensor) -> Tensor:
    """What the network starts from, whatever blur and noise there are."""
    return enlarge(y, scale)


def fold(spectrum: Tensor, scale: int) -> Tensor:
    """The mean of the parts that a spectrum (B, C, s h, s w) has after keeping every s-th pixel, (B, C, h, w)."""
    b, c, height, width = spectrum.shape
    return spectrum.reshape(b, c, scale, height // scale, scale, width // scale).mean((2, 4))


def data_step(z: Tensor, y: Tensor, transfer: Tensor, scale: int, alpha: Tensor) -> Tensor:
    """Solve min_x ||y - (k * x) down s||^2 + alpha ||x - z||^2."""
    raised = torch.zeros_like(z)
    raised[..., ::scale, ::scale] = y
    d = transfer.conj() * torch.fft.fft2(raised) + alpha * torch.fft.fft2(z)
    ratio = fold(transfer * d, scale) / (fold(transfer.abs().square(), scale) + alpha)
    return torch.fft.ifft2((d - transfer.conj() * ratio.tile(1, 1, scale, scale)) / alpha).real


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ResidualUNet(nn.Module):
    """Colour images and their noise level -> denoised images; sides that are no multiple of 4 are padded."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = (width, 3 * width // 2, 2 * width)
        self.head = nn.Conv2d(4, width, 3, padding=1, bias=False)
        self.encoders = nn.ModuleList(Residual(w) for w in widths[:-1])
        self.downs = nn.ModuleList(nn.Conv2d(a, b, 2, 2, bias=False) for a, b in zip(widths, widths[1:]))
        self.bottom = Residual(widths[-1])
        self.ups = nn.ModuleList(nn.ConvTranspose2d(b, a, 2, 2, bias=False) for a, b in zip(widths, widths[1:]))
        self.decoders = nn.ModuleList(Residual(w) for w in widths[:-1])
        self.tail = nn.Conv2d(width, 3, 3, padding=1, bias=False)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        padded = F.pad(x, (0, -w % 4, 0, -h % 4), mode="replicate")
        features = self.head(torch.cat([padded, sigma.expand_as(padded[:, :1])], 1))
        kept = []
        for encoder, down in zip(self.encoders, self.downs):
            kept.append(encoder(features))
            features = down(kept[-1])
        features = self.bottom(features)
        for up, decoder, skipped in zip(reversed(self.ups), reversed(self.decoders), reversed(kept)):
            features = decoder(up(features) + skipped)
        return x + self.tail(features)[..., :h, :w]


class UnfoldedHQS(nn.Module):
    """``forward(y, kernel, scale, sigma)``: small images (B, 3, h, w), blur, scale s, noise -> (B, 3, s h, s w)."""

    def __init__(self, iterations: int = ITERATIONS) -> None:
        super().__init__()
        # Of what is left to remove after each data step, from 50 of 255 down; the weight of the data step follows.
        self.sigmas = nn.Parameter(torch.logspace(-0.7, -2.1, iterations))
        self.weight = nn.Parameter(torch.full((iterations,), 0.25))
        self.denoiser = ResidualUNet()
        self.told: Tensor | None = None  # noise levels that a schedule has given, one for each iteration

    def forward(self, y: Tensor, k: Tensor, scale: int, sigma: Tensor) -> Tensor:
        x = first_estimate(y, k, scale, sigma)
        transfer = transfer_function(k, *x.shape[-2:])
        for i, (level, weight) in enumerate(zip(self.sigmas, self.weight)):
            noise = sigma if self.told is None else self.told[i].to(sigma)
            x = data_step(x, y, transfer, scale, weight.abs() * (noise / level).square() + 1e-4)
            x = self.denoiser(x, level)
        return x


def build() -> nn.Module:
    return UnfoldedHQS()


def measure(images: Tensor, sigma: float = 0.0) -> tuple[Tensor, Tensor, int, Tensor]:
    height, width = images.shape[-2:]
    padded = F.pad(images, (0, -width % SCALE, 0, -height % SCALE), mode="replicate")
    k = kernel().to(images)
    y = degrade(padded, k, SCALE)
    return y + sigma / 255 * torch.randn_like(y), k, SCALE, torch.tensor(max(sigma, NOISE_FLOOR) / 255)


def restore(output: Tensor, images: Tensor | None) -> Tensor:
    cut = output if images is None else output[..., : images.shape[-2], : images.shape[-1]]
    return cut.clamp(0, 1)


def schedule(net: nn.Module, sigmas: Sequence[float]) -> None:
    """The noise (0..255) that each iteration's data step reckons with."""
    net.told = torch.tensor([max(sigma, NOISE_FLOOR) / 255 for sigma in sigmas])


def noise_level(arguments: tuple[Tensor, Tensor, int, Tensor]) -> float:
    """The noise that the measurements say they have (0..255)."""
    return 255 * float(arguments[3])

"""Coded aperture snapshot spectral imaging with one disperser: 28 bands from one image, in nine unfolded iterations.

An aperture mask codes each band of the scene, a prism shifts it by two pixels a band, and the detector
adds all of them up. The network unfolds half-quadratic splitting of

    min_x  1/2 ||y - A x||^2 + r(x)

Its data step has a closed form, since A A^T is diagonal for this camera (Meng, Ma and Yuan, arXiv:2012.08364). Its
denoisers are U-shaped transformers with attention among the bands, as in MST (Cai et al., arXiv:2111.07910).

Cubes are array files, (H, W, 28) or (28, H, W) in [0, 1]. ``spectral_cubes.py`` makes synthetic ones.

The environment variable SPECTRAL_IMAGING_APERTURE names the camera: ``binary``, the default; ``blurred``, darker and
out of focus, as masks look when they are photographed; or an array file with a mask of your own, (H, W) in [0, 1].
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

BANDS = 28
SHIFT = 2  # pixels a band
PROJECTIONS = 20  # of the first estimate
STAGES = 9
FEW = 0.05  # pixels at the edges that see a smaller share than this of the bands count little
SMALL = 1e-6  # so that no pixel divides by zero
SIDE = 256  # pixels of the apertures that come with this file
APERTURE = os.environ.get("SPECTRAL_IMAGING_APERTURE", "binary")

channels = BANDS
patch = 96  # fewer bands overlap in smaller crops than in whole scenes
weights = "spectral_imaging.safetensors"
license = "apache-2.0"


@functools.cache
def aperture(name: str = APERTURE) -> Tensor:
    """The mask of a camera, (H, W), between 0 where it is closed and 1 where it is open."""
    if name == "binary":  # half of it is open; numpy promises that the stream of RandomState never changes
        mask = np.random.RandomState(0).random_sample((SIDE, SIDE)) < 0.5
    elif name == "blurred":
        mask = gaussian_filter((np.random.RandomState(1).random_sample((SIDE, SIDE)) < 0.35).astype(float), 0.6)
        mask *= 1 - 0.3 * np.square(np.linspace(-1, 1, SIDE)[:, None])  # less light at the top and bottom
    else:
        mask = np.load(name, allow_pickle=False)
        if mask.ndim != 2 or not (0 <= mask.min() and mask.max() <= 1):
            raise ValueError(f"expected a mask (H, W) in [0, 1] in {name}, found shape {mask.shape}")
    return torch.from_numpy(np.asarray(mask, np.float32))


def window(height: int, width: int) -> Tensor:
    """A part of the aperture of this size, (height, width): a random one where the aperture is larger."""
    mask = aperture()
    if height > mask.shape[0] or width > mask.shape[1]:
        mask = mask.repeat(*(math.ceil(side / have) for side, have in zip((height, width), mask.shape)))
    top, left = (int(torch.randint(have - side + 1, ())) for have, side in zip(mask.shape, (height, width)))
    return mask[top : top + height, left : left + width]


def camera(cube: Tensor, mask: Tensor) -> Tensor:
    """A x: cubes (B, 28, H, W) behind a mask (H, W) -> detector images (B, H, W + 54)."""
    return disperse(cube * mask).sum(1)


def camera_transposed(image: Tensor, mask: Tensor) -> Tensor:
    """A^T y: detector images (B, H, W + 54) -> cubes (B, 28, H, W)."""
    width = mask.shape[-1]
    return torch.stack([image[..., SHIFT * band : SHIFT * band + width] for band in range(BANDS)], 1) * mask


def open_bands(mask: Tensor) -> Tensor:
    """The diagonal of A A^T, which is diagonal: mask (H, W) -> (1, H, W + 54)."""
    return camera(mask.expand(1, BANDS, *mask.shape), mask)


def typical(mask: Tensor) -> Tensor:
    """What ``open_bands`` is on average where all bands overlap: mask (H, W) -> a scalar."""
    return (BANDS * mask.square().mean()).clamp(min=SMALL)


def first_estimate(y: Tensor, mask: Tensor) -> Tensor:
    """What the network starts from: detector images (B, H, W + 54) -> cubes (B, 28, H, W)."""
    return projections(y, mask, smooth, PROJECTIONS)


def projections(y: Tensor, mask: Tensor, denoise: Callable[[Tensor], Tensor], iterations: int) -> Tensor:
    """Project onto what was measured and denoise, in turns: detector images (B, H, W + 54) -> cubes (B, 28, H, W).

    What remains of ``y`` is added to the next target, as in accelerated generalised alternating projection (Yuan,
    arXiv:1511.03890).
    """
    overlap, target = open_bands(mask).clamp(min=FEW * typical(mask)), y
    x = denoise(camera_transposed(y / overlap, mask))
    for iteration in range(iterations):
        seen = camera(x, mask)
        if iteration:
            target = target + y - seen
        x = denoise(x + camera_transposed((target - seen) / overlap, mask))
    return x


def smooth(cube: Tensor) -> Tensor:
    """Average each value with its neighbours in space and wavelength, (B, 28, H, W)."""
    line = torch.tensor([0.25, 0.5, 0.25]).to(cube)
    kernel = line[:, None, None] * line[:, None] * line
    return F.conv3d(F.pad(cube[:, None], (1,) * 6, mode="replicate"), kernel[None, None])[:, 0]


def disperse(cube: Tensor) -> Tensor:
    """Shift band k by 2 k pixels to the right: (B, 28, H, W) -> (B, 28, H, W + 54)."""
    last = SHIFT * (BANDS - 1)
    shifted = [F.pad(band, (SHIFT * k, last - SHIFT * k)) for k, band in enumerate(cube.unbind(1))]
    return torch.stack(shifted, 1)


# --- denoiser ------------------------------------------------------------------------------------


class BandAttention(nn.Module):
    """Attention among channels, with a learned position for each pair of them, and a convolved position of pixels."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.scale = nn.Parameter(torch.ones(heads, 1, 1))
        self.position = nn.Parameter(torch.zeros(1, heads, dim // heads, dim // heads))
        self.project = nn.Linear(dim, dim)
        self.pixels = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
            nn.GELU(),
            nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        b, c, h, w = x.shape
        tokens = self.norm(x.flatten(2).mT)
        q, k, v = self.qkv(tokens).mT.reshape(b, 3, self.heads, c // self.heads, h * w).unbind(1)
        weights = F.normalize(k, dim=-1) @ F.normalize(q, dim=-1).mT * self.scale + self.position
        mixed = self.project((weights.softmax(-1) @ v).reshape(b, c, h * w).mT)
        return mixed.mT.reshape(b, c, h, w) + self.pixels(v.reshape(b, c, h, w))


class FeedForward(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.Sequential(
            nn.Conv2d(dim, 2 * dim, 1, bias=False),
            nn.GELU(),
            nn.Conv2d(2 * dim, 2 * dim, 3, padding=1, groups=2 * dim, bias=False),
            nn.GELU(),
            nn.Conv2d(2 * dim, dim, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self.norm(x.movedim(1, -1)).movedim(-1, 1))


class Block(nn.Module):
    """Attention, then a feed-forward part, each around a residual."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.attention = BandAttention(dim, heads)
        self.feed_forward = FeedForward(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class Denoiser(nn.Module):
    """A U-shaped transformer at two scales; sides that are odd are padded."""

    def __init__(self, dim: int = BANDS) -> None:
        super().__init__()
        self.embedding = nn.Conv2d(BANDS, dim, 3, padding=1, bias=False)
        self.encoder, self.bottleneck, self.decoder = Block(dim, 1), Block(2 * dim, 2), Block(dim, 1)
        self.down = nn.Conv2d(dim, 2 * dim, 2, 2, bias=False)
        self.up = nn.ConvTranspose2d(2 * dim, dim, 2, 2)
        self.fusion = nn.Conv2d(2 * dim, dim, 1, bias=False)
        self.mapping = nn.Conv2d(dim, BANDS, 3, padding=1, bias=False)
        nn.init.zeros_(self.mapping.weight)  # training starts from what the data steps do alone

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[-2:]
        padded = F.pad(x, (0, w % 2, 0, h % 2), mode="replicate") if h % 2 or w % 2 else x
        fine = self.encoder(self.embedding(padded))
        coarse = self.up(self.bottleneck(self.down(fine)))
        fused = self.decoder(self.fusion(torch.cat([coarse, fine], 1)))
        return x + self.mapping(fused)[..., :h, :w]


# --- network and task ----------------------------------------------------------------------------


class UnfoldedHQS(nn.Module):
    """``forward(y, mask)``: detector images (B, H, W + 54), mask (H, W) -> cubes (B, 28, H, W).

    ``mu`` is relative to how many bands a pixel sees, so that a darker aperture needs no other.
    """

    def __init__(self, stages: int = STAGES) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.full((stages,), 0.007))
        self.denoisers = nn.ModuleList(Denoiser() for _ in range(stages))

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        overlap, x, target = open_bands(mask), first_estimate(y, mask), y
        for mu, denoiser in zip((self.mu.abs() + SMALL) * typical(mask), self.denoisers):
            seen = camera(x, mask)
            target = target + y - seen  # accelerated, as in first_estimate
            x = denoiser(x + camera_transposed((target - seen) / (overlap + mu), mask))
        return x


def build() -> nn.Module:
    return UnfoldedHQS()


def measure(images: Tensor, sigma: float = 0.0) -> tuple[Tensor, Tensor]:
    mask = window(*images.shape[-2:]).to(images)
    y = camera(images, mask)
    return y + sigma / 255 * torch.randn_like(y), mask


def restore(output: Tensor, images: Tensor | None) -> Tensor:
    return output.clamp(0, 1)


def picture(images: Tensor) -> Tensor:
    """Cubes (B, 28, H, W) from 450 to 650 nm in false colour, (B, 3, H, W): the means of red, green and blue bands."""
    thirds = images.split([9, 10, 9], dim=1)
    return torch.stack([third.mean(1) for third in reversed(thirds)], 1)

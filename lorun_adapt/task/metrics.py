"""The metrics by which restored images are compared with the truth, by name.

Each takes two images (C, H, W) in [0, 1], and leaves out ``border`` pixels at each side.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from ..errors import LoRunError
from ..util.seeds import seeded

WINDOW = 11  # pixels: the side of SSIM's Gaussian window
LEAST_LPIPS = 31  # pixels a side: AlexNet needs as many for the layers that LPIPS compares


def psnr(image: Tensor, truth: Tensor, border: int = 0) -> float:
    """Return the peak signal-to-noise ratio in dB of ``image`` to ``truth``, both (C, H, W) in [0, 1].

    ``border`` pixels at each side are left out. Equal images have infinity.

    >>> round(psnr(torch.full((1, 16, 16), 0.6), torch.full((1, 16, 16), 0.5)), 3)
    20.0
    """
    return _psnr(_pixels(image, border), _pixels(truth, border), 1.0)


def ssim(image: Tensor, truth: Tensor, border: int = 0) -> float:
    """Return the structural similarity of ``image`` to ``truth``, both (C, H, W) in [0, 1].

    It has the Gaussian window of Wang et al. (2004), of 11 pixels; ``border`` pixels at each side are left out.

    >>> image = torch.linspace(0, 1, 256).reshape(1, 16, 16)
    >>> round(ssim(image, image), 3), ssim(1 - image, image) < 0.5
    (1.0, True)
    """
    return float(
        structural_similarity(
            _pixels(truth, border),
            _pixels(image, border),
            data_range=1.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def psnr_y(image: Tensor, truth: Tensor, border: int = 0) -> float:
    """Return the PSNR in dB of the luma of colour images (3, H, W) in [0, 1].

    Luma is Y of ITU-R BT.601, 16 to 235 on a scale of 0 to 255, as is usual in super-resolution (scikit-image's
    ``rgb2ycbcr``). ``border`` pixels at each side are left out. Equal images have infinity.

    Raises:
        LoRunError: the images do not have 3 channels.

    >>> round(psnr_y(torch.full((3, 16, 16), 0.6), torch.full((3, 16, 16), 0.5)), 3)
    21.322
    """
    if len(image) != 3:
        raise LoRunError(f"psnr_y is for colour images of 3 channels, found {len(image)}: leave psnr_y out")
    luma, true_luma = (rgb2ycbcr(_pixels(pixels, border), channel_axis=0)[0] for pixels in (image, truth))
    return _psnr(luma, true_luma, 255.0)


def sam(image: Tensor, truth: Tensor, border: int = 0) -> float:
    """Return the mean angle, in radians, between the spectra of the pixels of two cubes (C, H, W) of 2 or more bands.

    This is the spectral angle mapper of torchmetrics. Pixels that are black in ``truth`` have no angle and are left
    out, as are ``border`` pixels at each side; pixels that are black in ``image`` alone count as a right angle.

    Raises:
        LoRunError: the images have one channel, or torchmetrics is not installed.

    >>> round(sam(torch.ones(2, 4, 4), torch.stack([torch.zeros(4, 4), torch.ones(4, 4)])), 4)  # 45 degrees
    0.7854
    """
    if len(image) < 2:
        raise LoRunError("sam compares spectra, but the images have 1 channel: leave sam out")
    image, truth = (_cut(pixels, border).double() for pixels in (image, truth))
    angles = _angles()(image[None], truth[None], reduction="none")[0]
    angles = torch.where(image.any(dim=0), angles, torch.pi / 2)[truth.any(dim=0)]
    return float(angles.mean()) if len(angles) else 0.0


def lpips(image: Tensor, truth: Tensor, border: int = 0) -> float:
    """Return the perceptual distance of Zhang et al. (arXiv:1801.03924), on AlexNet, of grey or colour images.

    This is LPIPS of torchmetrics, which downloads AlexNet's weights the first time. ``border`` pixels at each side are
    left out.

    Raises:
        LoRunError: the images have neither 1 nor 3 channels or are too small, torchmetrics or torchvision is not
            installed, or the weights cannot be downloaded.
    """
    if len(image) not in (1, 3):
        raise LoRunError(f"lpips is for grey or colour images, found {len(image)} channels: leave lpips out")
    image, truth = (_cut(pixels, border).float().clamp(0, 1).expand(3, -1, -1) for pixels in (image, truth))
    if min(image.shape[1:]) < LEAST_LPIPS:
        raise LoRunError(
            f"lpips needs images of at least {LEAST_LPIPS + 2 * border} pixels a side, found "
            f"{min(image.shape[1:]) + 2 * border}: leave lpips out, or use larger images"
        )
    if not bool(torch.isfinite(image).all()):
        return float("nan")
    with torch.no_grad():
        return float(_alexnet()(image[None], truth[None]))


def _angles() -> Callable[..., Tensor]:
    try:
        from torchmetrics.functional.image import spectral_angle_mapper
    except ImportError as error:
        raise _not_installed("sam", error) from error
    return spectral_angle_mapper


@functools.cache
def _alexnet() -> Callable[[Tensor, Tensor], Tensor]:
    try:
        with warnings.catch_warnings(), seeded(0):  # making AlexNet draws random numbers
            warnings.simplefilter("ignore")
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).eval()
    except ImportError as error:
        raise _not_installed("lpips", error) from error
    except OSError as error:
        raise LoRunError(
            f"cannot download the weights of AlexNet for lpips ({error}): try again with a connection, or leave lpips "
            "out"
        ) from error


@dataclass(frozen=True)
class Metric:
    """A metric: the function, the title of its columns, and the digits after the point."""

    value: Callable[[Tensor, Tensor, int], float]
    title: str
    digits: int


METRICS = {
    "psnr": Metric(psnr, "PSNR", 2),
    "ssim": Metric(ssim, "SSIM", 4),
    "psnr_y": Metric(psnr_y, "PSNR of Y", 2),
    "sam": Metric(sam, "SAM (rad)", 4),
    "lpips": Metric(lpips, "LPIPS", 4),
}


def check_metrics(names: Sequence[str]) -> None:
    """Check that there are metrics of these names, and that what they need is at hand.

    Raises:
        LoRunError: there is none of a name, or its library is not installed, or its weights cannot be downloaded.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise LoRunError(f"no metric {unknown[0]!r}: choose from {', '.join(METRICS)}")
    if "sam" in names:
        _angles()
    if "lpips" in names:
        _alexnet()


def _psnr(image: NDArray[np.float64], truth: NDArray[np.float64], data_range: float) -> float:
    if np.array_equal(image, truth):
        return float("inf")
    return float(peak_signal_noise_ratio(truth, image, data_range=data_range))


def _pixels(image: Tensor, border: int) -> NDArray[np.float64]:
    return _cut(image, border).double().numpy()


def _cut(image: Tensor, border: int) -> Tensor:
    return image[:, border : image.shape[1] - border, border : image.shape[2] - border]


def _not_installed(metric: str, error: ImportError) -> LoRunError:
    return LoRunError(
        f"the metric {metric} needs torchmetrics, and lpips torchvision as well ({error}): pip install "
        "'lorun-adapt[metrics]', or leave the metric out"
    )

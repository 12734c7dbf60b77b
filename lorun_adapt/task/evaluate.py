"""PSNR and SSIM of a network and of its conversion, over a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.table import Table
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn

from ..errors import LoRunError
from ..network.converted import Quality
from ..util.nested import device_of, to_device
from ..util.progress import progress
from ..util.tables import table
from ..util.text import shortened
from .task import Task

PERFECT = 999.0  # dB, stands for infinity in files, as JSON has none
WINDOW = 11  # pixels: the side of SSIM's Gaussian window


@dataclass(frozen=True)
class Score:
    """PSNR in dB and SSIM of one image, restored by the original and the converted network; None without one."""

    name: str
    psnr: float | None
    ssim: float | None
    psnr_converted: float | None
    ssim_converted: float | None


@dataclass(frozen=True)
class Evaluation:
    """The scores of all images, and the numbers of parameters of the original and the converted network."""

    images: tuple[Score, ...]
    num_parameters: int
    num_parameters_converted: int | None

    def mean(self) -> dict[str, float | None]:
        """Return the mean PSNR in dB and SSIM over the images, by the names of a :class:`Score`."""
        names = ("psnr", "ssim", "psnr_converted", "ssim_converted")
        columns = {name: [getattr(score, name) for score in self.images] for name in names}
        return {name: None if None in values else fmean(values) for name, values in columns.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return all scores and their means, as ``eval --json`` prints them."""
        return {
            "images": [asdict(score) for score in self.images],
            "mean": self.mean(),
            "parameters": self.num_parameters,
            "parameters_converted": self.num_parameters_converted,
        }

    def quality(self, images: str, sigma: float) -> Quality:
        """Return the means as the quality of the conversion, for its card.

        Args:
            images: what the images are called, such as ``"BSD68"``.
            sigma: noise on the measurements (0..255).
        """
        mean = {name: None if value is None else min(value, PERFECT) for name, value in self.mean().items()}
        psnr, ssim = mean["psnr_converted"], mean["ssim_converted"]
        assert psnr is not None and ssim is not None, "the evaluation has no converted network"
        return Quality(
            shortened(images),
            len(self.images),
            sigma,
            psnr=psnr,
            ssim=ssim,
            psnr_original=mean["psnr"],
            ssim_original=mean["ssim"],
        )

    def tables(self) -> list[Table]:
        """Return a table of the scores and, with a converted network, one of the numbers of parameters."""
        columns = ("image", "PSNR>", "SSIM>", "PSNR converted>", "SSIM converted>")
        rows = [(s.name, *_cells(asdict(s))) for s in self.images]
        sizes = table(
            "",
            ("", "original>", "converted>"),
            [("parameters", f"{self.num_parameters:,}", f"{self.num_parameters_converted or 0:,}")],
        )
        result = [table("", columns, [*rows, ("mean", *_cells(self.mean()))])]
        return result if self.num_parameters_converted is None else [*result, sizes]


def evaluate(
    task: Task,
    files: Sequence[Path],
    original: nn.Module | None,
    converted: nn.Module | None,
    *,
    sigma: float = 0.0,
    num_parameters: int = 0,
    num_parameters_converted: int | None = None,
    description: str = "restoring",
) -> Evaluation:
    """Restore each image with both networks, from the same measurements, and score the results.

    Args:
        task: reads the images, measures them and runs the networks.
        files: the images.
        original, converted: the networks; None leaves one out.
        sigma: noise on the measurements (0..255).
        num_parameters, num_parameters_converted: sizes of the networks, for the report.
        description: what the progress bar says.

    Raises:
        LoRunError: an image cannot be read or is too small for SSIM, or a function of the task fails.

    >>> from types import SimpleNamespace
    >>> task = SimpleNamespace(
    ...     border=0,
    ...     read=lambda path: torch.full((1, 16, 16), 0.5),
    ...     measure=lambda images, sigma: (images + 0.1,),
    ...     run=lambda net, arguments, images: net(*arguments),
    ... )
    >>> result = evaluate(task, [Path("a.png")], nn.Identity(), None)
    >>> round(result.mean()["psnr"], 3)
    20.0
    """
    scores = []
    for path in progress(files, description, "image", delay=2, leave=False):
        images = task.read(path)[None]
        check_size(images, task.border, path)
        arguments = task.measure(images, sigma)
        values: list[float | None] = []
        for net in (original, converted):
            if net is None:
                values += [None, None]
                continue
            restored = task.run(net, to_device(arguments, device_of(net)), images)
            values += [psnr(restored[0], images[0], task.border), ssim(restored[0], images[0], task.border)]
        scores.append(Score(path.name, *values))
    return Evaluation(tuple(scores), num_parameters, num_parameters_converted)


def check_size(images: Tensor, border: int, path: Path) -> None:
    """Check that ``images`` (B, C, H, W), read from ``path``, are large enough for SSIM.

    Raises:
        LoRunError: a side has fewer than 11 pixels within the border.
    """
    if min(images.shape[-2:]) - 2 * border < WINDOW:
        raise LoRunError(
            f"expected images of at least {WINDOW + 2 * border} pixels a side, found {tuple(images.shape[-2:])} in "
            f"{path}: remove the image or use a larger one"
        )


def psnr(image: Tensor, truth: Tensor, border: int = 0) -> float:
    """Return the peak signal-to-noise ratio in dB of ``image`` to ``truth``, both (C, H, W) in [0, 1].

    ``border`` pixels at each side are left out. Equal images have infinity.

    >>> round(psnr(torch.full((1, 16, 16), 0.6), torch.full((1, 16, 16), 0.5)), 3)
    20.0
    """
    image, truth = _cut(image, border), _cut(truth, border)
    if torch.equal(image, truth):
        return float("inf")
    return float(peak_signal_noise_ratio(truth.double().numpy(), image.double().numpy(), data_range=1.0))


def ssim(image: Tensor, truth: Tensor, border: int = 0) -> float:
    """Return the structural similarity of ``image`` to ``truth``, both (C, H, W) in [0, 1].

    It has the Gaussian window of Wang et al. (2004), of 11 pixels; ``border`` pixels at each side are left out.

    >>> image = torch.linspace(0, 1, 256).reshape(1, 16, 16)
    >>> round(ssim(image, image), 3), ssim(1 - image, image) < 0.5
    (1.0, True)
    """
    return float(
        structural_similarity(
            _cut(truth, border).double().numpy(),
            _cut(image, border).double().numpy(),
            data_range=1.0,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
    )


def _cut(image: Tensor, border: int) -> Tensor:
    return image[:, border : image.shape[1] - border, border : image.shape[2] - border]


def _cells(values: dict[str, Any]) -> tuple[str, ...]:
    formats = {"psnr": "{:.2f}", "ssim": "{:.4f}", "psnr_converted": "{:.2f}", "ssim_converted": "{:.4f}"}
    return tuple("-" if values[name] is None else form.format(values[name]) for name, form in formats.items())

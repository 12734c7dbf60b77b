"""Metrics of a network and of its conversion, over a folder of images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.table import Table
from torch import Tensor, nn

from ..errors import LoRunError
from ..network.converted import Quality
from ..util.nested import device_of, to_device
from ..util.progress import progress
from ..util.tables import table
from ..util.text import shortened
from ..util.threads import helpful_threads, try_threads_again
from .metrics import METRICS, WINDOW, check_metrics
from .task import Task

PERFECT = 999.0  # dB, stands for infinity in files, as JSON has none
QUALITY = ("psnr", "ssim")  # the metrics that every model card has


@dataclass(frozen=True)
class Score:
    """The metrics of one image, restored by the original and the converted network.

    Attributes:
        name: the image's file name.
        values: by the names of the metrics, for the original, and the same names with ``_converted``; None without the
            network.
    """

    name: str
    values: dict[str, float | None]


@dataclass(frozen=True)
class Evaluation:
    """The scores of all images, and the numbers of parameters of the original and the converted network."""

    images: tuple[Score, ...]
    metrics: tuple[str, ...]
    num_parameters: int
    num_parameters_converted: int | None

    def mean(self) -> dict[str, float | None]:
        """Return the mean of each of the values of a :class:`Score` over the images."""
        columns = {name: [score.values[name] for score in self.images] for name in self.images[0].values}
        known = {name: [value for value in column if value is not None] for name, column in columns.items()}
        return {name: fmean(values) if values else None for name, values in known.items()}

    def as_dict(self) -> dict[str, Any]:
        """Return all scores and their means, as ``eval --json`` prints them."""
        return {
            "images": [{"name": score.name, **score.values} for score in self.images],
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
        further = [name for name in self.metrics if name not in QUALITY]
        return Quality(
            shortened(images),
            len(self.images),
            sigma,
            psnr=psnr,
            ssim=ssim,
            psnr_original=mean["psnr"],
            ssim_original=mean["ssim"],
            further={name: value for name in further if (value := mean[f"{name}_converted"]) is not None},
            further_original={name: value for name in further if (value := mean[name]) is not None},
        )

    def tables(self) -> list[Table]:
        """Return a table of the scores and, with a converted network, one of the numbers of parameters."""
        titles = [METRICS[name].title for name in self.metrics]
        columns = ("image", *(f"{title}>" for title in titles), *(f"{title} converted>" for title in titles))
        rows = [(s.name, *self._cells(s.values)) for s in self.images]
        sizes = table(
            "",
            ("", "original>", "converted>"),
            [("parameters", f"{self.num_parameters:,}", f"{self.num_parameters_converted or 0:,}")],
        )
        result = [table("", columns, [*rows, ("mean", *self._cells(self.mean()))])]
        return result if self.num_parameters_converted is None else [*result, sizes]

    def _cells(self, values: dict[str, float | None]) -> list[str]:
        digits = [METRICS[name].digits for name in self.metrics] * 2
        return ["-" if value is None else f"{value:.{n}f}" for value, n in zip(values.values(), digits)]


def evaluate(
    task: Task,
    files: Sequence[Path],
    original: nn.Module | None,
    converted: nn.Module | None,
    *,
    sigma: float = 0.0,
    metrics: str | Sequence[str] = (),
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
        metrics: names of metrics beside PSNR and SSIM: ``"psnr_y"``, ``"sam"``, ``"lpips"``.
        num_parameters, num_parameters_converted: sizes of the networks, for the report.
        description: what the progress bar says.

    Raises:
        LoRunError: an image cannot be read, or is too small for SSIM or wrong for another metric; there is no such
            metric, or what it needs is not installed; a function of the task fails.

    >>> import torch
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
    names = tuple(dict.fromkeys((*QUALITY, *([metrics] if isinstance(metrics, str) else metrics))))
    check_metrics(names)
    scores = []
    with helpful_threads():
        for path in progress(files, description, "image", delay=2, leave=False):
            try_threads_again()
            images = task.read(path)[None]
            check_size(images, task.border, path)
            arguments = task.measure(images, sigma)
            values: dict[str, float | None] = {}
            for net, suffix in ((original, ""), (converted, "_converted")):
                restored = None if net is None else task.run(net, to_device(arguments, device_of(net)), images)[0]
                for name in names:
                    value = METRICS[name].value
                    values[name + suffix] = None if restored is None else value(restored, images[0], task.border)
            scores.append(Score(path.name, values))
    return Evaluation(tuple(scores), names, num_parameters, num_parameters_converted)


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

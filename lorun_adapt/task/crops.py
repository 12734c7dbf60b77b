"""Batches to recover and to fine-tune on: random crops of images, and the images held out to judge by."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRunError
from ..util.energy import relative_error
from ..util.nested import to_device
from ..util.numbers import is_number
from ..util.seeds import seeded
from .task import Task

MAX_HELD_OUT = 20  # images
NUM_JUDGED = 4  # batches of crops to judge by
BATCH_PIXELS = 16 * 33 * 33  # enough to steady a step, few enough to take many steps
DIMMED = 0.25  # the share of dimmed crops
DARKEST = 0.1  # what the values of a dimmed crop are multiplied by, at the least


def held_out_of(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Split image files into held-out images (a fifth, at most 20) and images to train on.

    Raises:
        LoRunError: there are fewer than two images.

    >>> held_out, training = held_out_of([Path(f"{i}.png") for i in range(6)])
    >>> [len(held_out), len(training)]
    [1, 5]
    """
    if len(files) < 2:
        raise LoRunError(
            f"expected 2 or more images, one of them to hold out, found {', '.join(map(str, files)) or 'none'}: add "
            "images, or cut one into several"
        )
    count = min(MAX_HELD_OUT, max(1, len(files) // 5))
    places = {len(files) * i // count for i in range(count)}
    held_out = [file for i, file in enumerate(files) if i in places]
    return held_out, [file for i, file in enumerate(files) if i not in places]


class Measurements(tuple):
    """The arguments of a forward, as a tuple, and in ``truth`` the images (B, C, H, W) that were measured."""

    truth: Tensor

    def to(self, device: torch.device) -> Measurements:
        """Return a copy on ``device``."""
        moved = Measurements(to_device(tuple(self), device))
        moved.truth = self.truth.to(device)
        return moved


class Crops:
    """An endless iterable of batches: random crops of images, rotated, mirrored and dimmed, as the task measures them.

    Each iteration starts the same sequence of crops again.

    Args:
        task: gives the side of a crop (``patch``), reads the images and measures the crops.
        files: the images. Those smaller than a crop are left out; if all are, the crop shrinks to fit the largest
            image.
        sigma: noise on the measurements (0..255).
        seed: of the choice of crops.
        size: how many crops are in a batch; by default as many as make 17,000 pixels.
        dimmed: the share of crops, 0 to 1, whose values are multiplied by a random factor from 0.1 to 1. A network
            recovered on these is good on dark images, too. By default a quarter of them, or none if there is noise.

    Raises:
        LoRunError: no files; an image cannot be read, or holds NaN or Inf; ``dimmed`` is not a share.

    >>> from types import SimpleNamespace
    >>> task = SimpleNamespace(
    ...     patch=8, read=lambda path: torch.rand(1, 20, 30), measure=lambda images, sigma: (images / 2,)
    ... )
    >>> batch = next(iter(Crops(task, [Path("a.png"), Path("b.png")], size=4)))
    >>> batch[0].shape, torch.equal(batch[0] * 2, batch.truth)
    (torch.Size([4, 1, 8, 8]), True)
    """

    def __init__(
        self,
        task: Task,
        files: Sequence[Path],
        *,
        sigma: float = 0.0,
        seed: int = 0,
        size: int | None = None,
        dimmed: float | None = None,
    ) -> None:
        if dimmed is not None and not (is_number(dimmed) and 0 <= dimmed <= 1):
            raise LoRunError(f"expected a share of dimmed crops from 0 to 1, found {dimmed!r}: give 0.5, for example")
        if not files:
            raise LoRunError(
                "expected image files to make crops of, found none: give the files of a folder with images"
            )
        images = [task.read(path) for path in files]
        for path, image in zip(files, images):
            if not bool(torch.isfinite(image).all()):
                raise LoRunError(f"expected finite pixels, found NaN or Inf in {path}: remove the image")
        shortest = [min(image.shape[-2:]) for image in images]
        self.side = min(task.patch, max(shortest))
        self.images = [image for image, side in zip(images, shortest) if side >= self.side]
        if len(self.images) < len(images):
            warnings.warn(
                f"{len(images) - len(self.images)} of {len(images)} images are smaller than a crop of {self.side} "
                "pixels and are left out",
                stacklevel=2,
            )
        self.task, self.sigma, self.seed = task, sigma, seed
        self.dimmed = (0.0 if sigma else DIMMED) if dimmed is None else dimmed
        self.size = size or max(1, round(BATCH_PIXELS / self.side**2))

    def __iter__(self) -> Iterator[Measurements]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            crops = torch.stack([self._crop(generator) for _ in range(self.size)])
            batch = Measurements(self.task.measure(crops, self.sigma))
            batch.truth = crops
            yield batch

    def some(self) -> list[Measurements]:
        """Return the first batches, to judge by: the same ones each time, noise included."""
        with seeded(self.seed):
            return list(itertools.islice(self, NUM_JUDGED))

    def loss(self, output: Any, batch: Measurements) -> Tensor:
        """Return the squared error of the restored images relative to the energy of the truth, a scalar."""
        return relative_error(self.task.restored(output, batch.truth), batch.truth)

    def _crop(self, generator: torch.Generator) -> Tensor:
        def draw(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        image = self.images[draw(len(self.images))]
        top, left = (draw(side - self.side + 1) for side in image.shape[-2:])
        crop = image[:, top : top + self.side, left : left + self.side]
        crop = torch.rot90(crop, draw(4), (-2, -1))
        crop = crop.flip(-1) if draw(2) else crop
        chance, exponent = torch.rand(2, generator=generator)
        return DARKEST ** float(exponent) * crop if chance < self.dimmed else crop

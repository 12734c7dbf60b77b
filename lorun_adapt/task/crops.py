"""Batches to recover and to fine-tune on: a user's iterable, or crops of a folder of images."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRunError
from ..training.distill import relative_error
from ..util.nested import to_device
from ..util.seeds import seeded
from .task import Task

MOST_HELD_OUT = 20  # images
JUDGED = 4  # batches of crops of these
PIXELS = 16 * 33 * 33  # in a batch of crops: enough to steady a step, few enough to take many


def held_out_of(files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """A fifth of the images, but no more than 20, to judge by, and the others to train on.

    Raises:
        LoRunError: fewer than two images.
    """
    if len(files) < 2:
        raise LoRunError(
            f"expected 2 images or more, of which one is held out, found only {files[0]}: give others, or cut it up"
        )
    count = min(MOST_HELD_OUT, max(1, len(files) // 5))
    kept = {len(files) * i // count for i in range(count)}
    return [file for i, file in enumerate(files) if i in kept], [file for i, file in enumerate(files) if i not in kept]


class Measurements(tuple):
    """The arguments of a forward, and the images (B, C, H, W) that they are measurements of."""

    truth: Tensor

    def to(self, device: torch.device) -> Measurements:
        moved = Measurements(to_device(tuple(self), device))
        moved.truth = self.truth.to(device)
        return moved


class Crops:
    """Batches of random crops of images, turned and mirrored, without end, as the arguments that a task makes.

    Args:
        task: says how large a crop is (``patch``) and how it is measured.
        files: the images; one that is smaller than a crop is used whole if all are so, and else left out.
        sigma: noise on the measurements, on a scale of 0 to 255.
        seed: of the choice of crops.
        size: crops in a batch; by default as many as make 17,000 pixels.

    Raises:
        LoRunError: an image that can't be read, or that holds NaN.
    """

    def __init__(
        self, task: Task, files: Sequence[Path], *, sigma: float = 0.0, seed: int = 0, size: int | None = None
    ) -> None:
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
        self.size = size or max(1, round(PIXELS / self.side**2))

    def __iter__(self) -> Iterator[Measurements]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            crops = torch.stack([self._crop(generator) for _ in range(self.size)])
            batch = Measurements(self.task.measure(crops, self.sigma))
            batch.truth = crops
            yield batch

    def some(self) -> list[Measurements]:
        """A few batches, to judge by."""
        with seeded(self.seed):  # of the noise
            return list(itertools.islice(self, JUDGED))

    def loss(self, output: Any, batch: Measurements) -> Tensor:
        """The relative squared error of the restored images to the truth."""
        return relative_error(self.task.restored(output, batch.truth), batch.truth)

    def _crop(self, generator: torch.Generator) -> Tensor:
        def draw(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        image = self.images[draw(len(self.images))]
        top, left = (draw(side - self.side + 1) for side in image.shape[-2:])
        crop = image[:, top : top + self.side, left : left + self.side]
        crop = torch.rot90(crop, draw(4), (-2, -1))
        return crop.flip(-1) if draw(2) else crop

"""Batches to recover and to fine-tune on: a user's iterable, or crops of a folder of images."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .distill import relative_error
from .errors import LoRunError
from .nested import tensors_in, to_device
from .seeds import seeded
from .task import Task

Batch = tuple[Any, ...]  # the arguments of a network's forward
KEPT_BYTES = 1 << 30  # of an iterator that can't be started anew, to go on with when it ends
MOST_HELD_OUT = 20  # images
JUDGED = 4  # batches of crops of these
PIXELS = 16 * 33 * 33  # in a batch of crops: enough to steady a step, few enough to take many


class Batches(Iterator[Batch]):
    """The batches of a calibration, over and over; made once for a run, since some can be iterated only once.

    Attributes:
        first: the first batch, drawn at once, so that what can't be used is known before any work.

    Raises:
        LoRunError: something that can't be iterated, that is empty, or that holds no argument tuples.
    """

    def __init__(self, calibration: Iterable[Any]) -> None:
        stream = calibration if isinstance(calibration, Batches) else _endless(calibration)
        self.first = next(stream)
        self._stream = itertools.chain([self.first], stream)

    def __next__(self) -> Batch:
        return next(self._stream)


def _endless(calibration: Iterable[Any]) -> Iterator[Batch]:
    if isinstance(calibration, (Tensor, str, dict)) or not isinstance(calibration, Iterable):
        raise LoRunError(
            f"expected calibration to be an iterable of argument tuples, found {type(calibration).__name__}: pass a "
            "DataLoader or a list such as [(y,), …]"
        )
    once = isinstance(calibration, Iterator)
    kept: list[Batch] = []
    room = KEPT_BYTES
    for turn in itertools.count():
        drawn = 0
        for drawn, item in enumerate(calibration if turn == 0 or not once else kept, 1):
            batch = _as_batch(item, drawn - 1)
            if once and turn == 0 and room > 0:
                kept.append(batch)
                room -= sum(tensor.nbytes for tensor in tensors_in(batch))
            yield batch
        if not drawn:
            raise LoRunError(
                "expected calibration to hold batches, found none: pass measurements to run the network on"
                if turn == 0
                else "expected calibration to give its batches again, found none the second time: pass a list or a "
                "DataLoader"
            )


def _as_batch(item: Any, index: int) -> Batch:
    if isinstance(item, Tensor):
        return (item,)
    if isinstance(item, (tuple, list)) and item:
        return item if isinstance(item, tuple) else tuple(item)
    raise LoRunError(
        f"expected batch {index} of calibration to be a tensor or a tuple of the forward's arguments, found "
        f"{'an empty one' if isinstance(item, (tuple, list)) else type(item).__name__}: have it yield such"
    )


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


def is_finite(batch: Batch) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(batch))


class Measured(tuple):
    """The arguments of a forward, and the images (B, C, H, W) that they are measurements of."""

    truth: Tensor

    def to(self, device: torch.device) -> Measured:
        moved = Measured(to_device(tuple(self), device))
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

    def __iter__(self) -> Iterator[Measured]:
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            crops = torch.stack([self._crop(generator) for _ in range(self.size)])
            batch = Measured(self.task.measure(crops, self.sigma))
            batch.truth = crops
            yield batch

    def some(self) -> list[Measured]:
        """A few batches, to judge by."""
        with seeded(self.seed):  # of the noise
            return list(itertools.islice(self, JUDGED))

    def loss(self, output: Any, batch: Measured) -> Tensor:
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

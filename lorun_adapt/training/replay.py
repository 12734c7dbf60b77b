"""Use what takes long to compute of a batch, such as the teacher's outputs, in more than one step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch

from ..network.batches import Batch
from ..util.nested import num_bytes, tensors_in, to_device

T = TypeVar("T")

STEPS_PER_BATCH = 3  # the teacher takes a third of a step's time
MAX_BYTES = 1 << 30


class Replay(Generic[T]):
    """Computes something from each batch, and picks a batch for each step: a new one, or one that is kept.

    Every third step uses a new batch; the other steps use a random one of the batches that are kept. These are the
    newest, as many as fit in 1 GiB with what is computed from them; the size of that is estimated from the first batch.

    Args:
        batches: the batches; they are drawn when they are needed.
        compute: what is needed of a batch, from the batch and a seed.
        seed: seed of the choice, and of the first batch.
        stride: by how much the seeds of a batch and the next one differ.
        steps_per_batch: how many steps there are for each new batch, if not three.

    Attributes:
        left_out: numbers of batches, counted from 0, that are not to be used again.
        last: the number of the batch of the last step.

    >>> import torch
    >>> batches = (torch.full((1,), float(i)) for i in range(9))
    >>> replay = Replay(((batch,) for batch in batches), lambda batch, seed: batch[0].item(), seed=0)
    >>> [replay.for_step(step) for step in (0, 1, 2, 3, 6, 9)]
    [0.0, 0.0, 0.0, 1.0, 2.0, 3.0]
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        compute: Callable[[Batch, int], T],
        seed: int,
        stride: int = 1,
        steps_per_batch: int = STEPS_PER_BATCH,
    ) -> None:
        self._batches, self._compute, self._seed, self._stride = batches, compute, seed, stride
        self._steps_per_batch = steps_per_batch
        self.left_out: list[int] = []
        self.last = 0
        self._drawn = 0
        self._kept: dict[int, Batch] = {}  # by their numbers, counted from 0, in order
        self._bytes: dict[int, int] = {}  # of these
        self._computed: dict[int, T] = {}
        self._room = MAX_BYTES if steps_per_batch > 1 else 0
        self._growth: float | None = None  # bytes of a batch and what is computed of it, over those of the batch

    def first(self) -> Iterator[T]:
        """Yield what is computed of the batches from the first one on; what there is room for is kept for the steps."""
        for number in itertools.count():
            self._draw()
            yield self._item(number)

    def for_step(self, step: int) -> T:
        """Return what is computed of the batch for this step: the same for the same step, also after resuming."""
        newest, rest = divmod(step, self._steps_per_batch)
        if not self._drawn:
            self._draw()
            self._item(0)
        while self._drawn <= newest:
            self._draw()
            self._forget(self._drawn - 1)
        self._forget(newest)
        usable = [number for number in self._kept if number <= newest and number not in self.left_out]
        self.last = random.Random(self._seed + step).choice(usable) if rest and usable else newest
        return self._item(self.last)

    def clear(self) -> None:
        """Forget what is kept."""
        self._kept.clear()
        self._bytes.clear()
        self._computed.clear()

    def _draw(self) -> None:
        self._kept[self._drawn] = batch = owned(next(self._batches))
        self._bytes[self._drawn] = num_bytes(batch)
        self._drawn += 1

    def _forget(self, newest: int) -> None:
        """Forget the batches for which there is no room beside the newer ones, up to this one."""
        room = float(self._room)
        for number in [number for number in reversed(self._kept) if number <= newest]:
            room -= self._size(number)
            if room < 0 and number < newest:
                del self._kept[number], self._bytes[number]
                self._computed.pop(number, None)

    def _size(self, number: int) -> float:
        return (self._growth or 1.0) * self._bytes[number]

    def _item(self, number: int) -> T:
        if number in self._computed:
            return self._computed[number]
        batch = self._kept[number]
        item = self._compute(batch, self._seed + number * self._stride)
        if self._growth is None:
            self._growth = num_bytes((batch, item)) / max(1, self._bytes[number])
        if not self._computed or sum(map(self._size, (number, *self._computed))) <= self._room:
            self._computed[number] = item
        return item


def owned(batch: Batch) -> Batch:
    """The batch, copied if it is in shared memory, of which workers of a ``DataLoader`` need little at a time."""
    shared = any(tensor.device.type == "cpu" and tensor.is_shared() for tensor in tensors_in(batch))
    return to_device(batch, torch.device("cpu")) if shared else batch

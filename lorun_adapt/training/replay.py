"""Use what takes long to compute of a batch, such as the teacher's outputs, in more than one step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from ..network.batches import Batch, is_finite
from ..util.nested import num_bytes

T = TypeVar("T")

STEPS_PER_BATCH = 3  # the teacher takes a third of a step's time
MAX_BYTES = 1 << 30


class Replay(Generic[T]):
    """Computes something of each batch, and picks a batch for each step: a new one, or one that is kept.

    Every third step has a new batch. The others have one of those that are kept, at random: the newest ones, as many as
    fit in 1 GiB with what was computed of them. A batch with NaN or Inf is used in one step only.

    Args:
        batches: the batches; they are drawn when they are needed.
        compute: what is needed of a batch, from the batch and a seed.
        seed: seed of the choice, and of the first batch.
        stride: by how much the seeds of a batch and the next one differ.
        steps_per_batch: how many steps there are for each new batch, if not three.

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
        self._drawn = 0
        self._kept: dict[int, Batch] = {}  # by their numbers, counted from 0, in order
        self._finite: set[int] = set()
        self._computed: dict[int, T] = {}
        self._most: int | None = None  # batches that there is room for, as the first one shows

    def first(self) -> Iterator[T]:
        """Yield what is computed of the batches from the first one on; what there is room for is kept for the steps."""
        for number in itertools.count():
            yield self._item(number)

    def for_step(self, step: int) -> T:
        """Return what is computed of the batch for this step: the same for the same step, also after resuming."""
        newest, rest = divmod(step, self._steps_per_batch)
        if self._most is None:
            self._item(0)
        self._draw(newest)
        oldest = newest + 1 - (self._most or 1)
        for number in [number for number in self._kept if number < oldest]:
            self._kept.pop(number)
            self._computed.pop(number, None)
        usable = [number for number in self._kept if number <= newest and number in self._finite]
        return self._item(random.Random(self._seed + step).choice(usable) if rest and usable else newest)

    def clear(self) -> None:
        """Forget what is kept."""
        self._kept.clear()
        self._computed.clear()

    def _draw(self, number: int) -> None:
        while self._drawn <= number:
            batch = self._kept[self._drawn] = next(self._batches)
            if is_finite(batch):
                self._finite.add(self._drawn)
            self._drawn += 1

    def _item(self, number: int) -> T:
        self._draw(number)
        if number in self._computed:
            return self._computed[number]
        item = self._compute(self._kept[number], self._seed + number * self._stride)
        if self._most is None:
            room = MAX_BYTES if self._steps_per_batch > 1 else 0
            self._most = max(1, room // max(1, num_bytes((self._kept[number], item))))
        if len(self._computed) < self._most:
            self._computed[number] = item
        return item

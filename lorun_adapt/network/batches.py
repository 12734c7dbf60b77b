"""The batches that a network is calibrated, trained and checked on."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..errors import LoRunError
from ..util.nested import num_bytes, tensors_in

Batch = tuple[Any, ...]  # the arguments of a network's forward

T = TypeVar("T")

HELD_OUT = 2  # batches to judge by, unless the caller holds out others
IN_A_ROW = 5  # batches with NaN or Inf that are tolerated one after another
MAX_KEPT_BYTES = 1 << 30  # of the batches of an iterator, which are kept as it can't be started again


class Batches(Iterator[Batch]):
    """The batches of a calibration, over and over.

    Make one for a run: some calibrations can be iterated only once.

    >>> batches = Batches([torch.zeros(1), (torch.ones(1), 0.5)])
    >>> batches.first
    (tensor([0.]),)
    >>> [next(batches) for _ in range(3)]
    [(tensor([0.]),), (tensor([1.]), 0.5), (tensor([0.]),)]

    Args:
        calibration: an iterable of tensors or argument tuples, such as a list or a ``DataLoader``. The batches of an
            iterator are kept, up to 1 GiB, and repeated when it ends.

    Attributes:
        first: the first batch; it is drawn at once, so that a bad calibration is refused before any work.
        drawn: how many batches have been drawn.

    Raises:
        LoRunError: the calibration is not iterable, is empty, or holds something else.
    """

    def __init__(self, calibration: Iterable[Any]) -> None:
        stream = calibration if isinstance(calibration, Batches) else _endless(calibration)
        self.first = next(stream)
        self._stream = itertools.chain([self.first], stream)
        self.drawn = 0

    def __next__(self) -> Batch:
        batch = next(self._stream)
        self.drawn += 1
        return batch

    def skip_to(self, drawn: int) -> None:
        """Draw batches until so many have been drawn."""
        while self.drawn < drawn:
            next(self)


def _endless(calibration: Iterable[Any]) -> Iterator[Batch]:
    if isinstance(calibration, (Tensor, str, dict)) or not isinstance(calibration, Iterable):
        raise LoRunError(
            f"expected calibration to be an iterable of argument tuples, found {type(calibration).__name__}: pass a "
            "DataLoader or a list such as [(y,), …]"
        )
    once = isinstance(calibration, Iterator)
    kept: list[Batch] = []
    room = MAX_KEPT_BYTES
    for turn in itertools.count():
        count = 0
        for count, item in enumerate(calibration if turn == 0 or not once else kept, 1):
            batch = _as_batch(item, count - 1)
            if once and turn == 0 and room > 0:
                kept.append(batch)
                room -= num_bytes(batch)
            yield batch
        if not count:
            raise LoRunError(
                "calibration has no batches: pass measurements to run the network on"
                if turn == 0
                else "calibration has no batches when it is iterated again: pass a list or a DataLoader"
            )


def _as_batch(item: Any, index: int) -> Batch:
    if isinstance(item, Tensor):
        return (item,)
    if isinstance(item, (tuple, list)) and item:
        return item if isinstance(item, tuple) else tuple(item)
    kind = type(item).__name__
    raise LoRunError(
        f"expected batch {index} of calibration to be a tensor or a tuple of the forward's arguments, found "
        f"{f'an empty {kind}' if isinstance(item, (tuple, list)) else kind}: change what calibration yields"
    )


def is_finite(batch: Batch) -> bool:
    """Whether no tensor of a batch has NaN or Inf."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(batch))


def finite_batches_of(calibration: Batches) -> list[Batch]:
    """Return the next batches without NaN or Inf, to judge by.

    Raises:
        LoRunError: too many batches in a row have NaN or Inf.
    """
    return [next_finite(calibration) for _ in range(HELD_OUT)]


def while_there_is_time(items: Iterator[T], time_left: Callable[[], bool]) -> Iterator[T]:
    """The first of ``items``, and more while there is time.

    >>> list(while_there_is_time(iter("abc"), lambda: False))
    ['a']
    """
    for number in itertools.count():
        if number and not time_left():
            return
        try:
            yield next(items)
        except StopIteration:
            return


def next_finite(calibration: Batches) -> Batch:
    """Return the next batch that has no NaN or Inf.

    Raises:
        LoRunError: six batches in a row have NaN or Inf.
    """
    for _ in range(IN_A_ROW + 1):
        if is_finite(batch := next(calibration)):
            return batch
        warnings.warn("NaN or Inf in a batch of calibration: the batch is skipped", stacklevel=2)
    raise LoRunError(
        f"{IN_A_ROW + 1} batches of calibration in a row have NaN or Inf: check how they are made, and remove such "
        "batches"
    )

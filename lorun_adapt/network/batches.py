"""."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import LoRunError
from ..util.nested import tensors_in

Batch = tuple[Any, ...]  # the arguments of a network's forward


KEPT_BYTES = 1 << 30  # of an iterator that can't be started anew, to go on with when it ends


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


def is_finite(batch: Batch) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(batch))

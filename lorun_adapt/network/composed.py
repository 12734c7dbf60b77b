"""In a forward without gradients, compute each stage's tensors once, however often the network reads them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

STAGE = "lorun_stage"  # attribute of a module with terms: the stage that it belongs to


class Composed:
    """The tensors of the stage that runs; those of the stage before are dropped, so that few are in memory."""

    def __init__(self) -> None:
        self._stage: object = None
        self._tensors: dict[tuple[nn.Module, str], Tensor] = {}

    def tensor(self, module: nn.Module, attribute: str, compose: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return what ``compose(module)`` returned before in this stage, or call it."""
        stage = vars(module).get(STAGE)
        if stage != self._stage:
            self._stage = stage
            self._tensors.clear()
        key = module, attribute
        found = self._tensors.get(key)
        if found is None:
            found = self._tensors[key] = compose(module)
        return found


class _Threads(threading.local):
    composed: Composed | None = None


_threads = _Threads()


@contextmanager
def composing_once() -> Iterator[None]:
    """Run one forward in the block; with gradients, each read computes the tensor, so that autograd sees it.

    >>> with torch.no_grad(), composing_once():
    ...     composed() is None
    False
    """
    before = _threads.composed
    _threads.composed = None if torch.is_grad_enabled() else Composed()
    try:
        yield
    finally:
        _threads.composed = before


def composed() -> Composed | None:
    """Return the tensors of this thread's forward; None if they are not kept."""
    return None if torch.is_grad_enabled() else _threads.composed

"""In a forward without gradients, compute each stage's tensors once, however often the network reads them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

STAGE, READ_ONCE = "lorun_stage", "lorun_read_once"  # attributes of a module with terms: see `mark`


def mark(module: nn.Module, stage: int | None) -> None:
    """Note the stage that ``module`` belongs to, and which of its tensors a forward was seen to read only once."""
    vars(module)[STAGE] = stage
    vars(module)[READ_ONCE] = frozenset()


class Composed:
    """The tensors of the stage that runs; those of the stage before are dropped, so that few are in memory."""

    def __init__(self) -> None:
        self._stage: object = None
        self._tensors: dict[tuple[nn.Module, str], Tensor] = {}
        self._reads: dict[tuple[nn.Module, str], int] = {}

    def tensor(self, module: nn.Module, attribute: str, compose: Callable[[nn.Module], Tensor]) -> Tensor:
        """Return what ``compose(module)`` returned before in this stage, or call it."""
        stage = vars(module)[STAGE]
        if stage != self._stage:
            self._stage = stage
            self._tensors.clear()
        key = module, attribute
        self._reads[key] = self._reads.get(key, 0) + 1
        found = self._tensors.get(key)
        if found is None:
            found = self._tensors[key] = compose(module)
        return found

    def note_reads(self) -> None:
        """Note, for the next forwards, what this one has read only once."""
        for (module, attribute), count in self._reads.items():
            if count == 1:
                vars(module)[READ_ONCE] |= {attribute}


class _Threads(threading.local):
    composed: Composed | None = None


_threads = _Threads()


@contextmanager
def composing_once() -> Iterator[None]:
    """Run one forward in the block; with gradients, each read computes the tensor, so that autograd sees it.

    >>> with torch.no_grad(), composing_once():
    ...     print(_threads.composed is None)
    False
    """
    before = _threads.composed
    _threads.composed = now = None if torch.is_grad_enabled() else Composed()
    try:
        yield
        if now is not None:
            now.note_reads()
    finally:
        _threads.composed = before


def keeps(module: nn.Module, attribute: str) -> bool:
    """Whether to ask :func:`kept` for a tensor. Keeping one that is read once would only cost memory, and so time."""
    return attribute not in module.__dict__[READ_ONCE] and _threads.composed is not None


def kept(module: nn.Module, attribute: str, compose: Callable[[nn.Module], Tensor]) -> Tensor:
    """Return a stage's tensor, computed by ``compose(module)`` at the first read in this thread's forward."""
    forward = _threads.composed
    if forward is None or torch.is_grad_enabled():  # within a forward without gradients, a part may have some
        return compose(module)
    return forward.tensor(module, attribute, compose)

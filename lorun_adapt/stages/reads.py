"""What a forward reads, and when: measurements come in between the stages of an unfolding, but not between layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from ..util.nested import tensors_in

START = -1  # before the forward
CONNECTIONS = (torch.ops.aten.add, torch.ops.aten.add_, torch.ops.aten.cat, torch.ops.aten.stack)


@dataclass(frozen=True)
class _Origin:
    """How a tensor came to be: when, and whether weights took part; and when it was read.

    A residual or skip connection reads a tensor only to add it to another, or to put it beside another: such readings
    are in ``read``, but not in ``used``.
    """

    made: int
    learned: bool
    read: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)


class ReadTrace(TorchDispatchMode):
    """Notes, while it is active, which operation reads which tensor.

    Args:
        clock: gives the times.

    >>> import itertools, torch
    >>> y = torch.ones(2)
    >>> with ReadTrace(itertools.count()) as reads:  # times 0 and 1: the data steps, 2 is another operation
    ...     x = 0.5 * (0.5 * y + y).neg()
    >>> reads.between([(0, 0), (1, 1)])
    True
    """

    def __init__(self, clock: Iterator[int]) -> None:
        super().__init__()
        self._clock = clock
        self._origins: list[_Origin] = []
        self._of = WeakIdKeyDictionary()  # by tensor: its origin

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        now, kwargs = next(self._clock), kwargs or {}
        # A single number, such as a step size, is no measurement.
        sources = [self._origin(tensor) for tensor in tensors_in([args, kwargs]) if tensor.numel() > 1]
        for source in sources:
            source.read.append(now)
            if func.overloadpacket not in CONNECTIONS:
                source.used.append(now)
        result = func(*args, **kwargs)
        learned = any(source.learned for source in sources)
        for tensor in tensors_in([result]):
            self._note(tensor, _Origin(now, learned))  # anew, where the operation works in place
        return result

    def _origin(self, tensor: Tensor) -> _Origin:
        return self._of.get(tensor) or self._note(tensor, _Origin(START, learned=isinstance(tensor, nn.Parameter)))

    def _note(self, tensor: Tensor, origin: _Origin) -> _Origin:
        self._of[tensor] = origin
        self._origins.append(origin)
        return origin

    def between(self, spans: Sequence[tuple[int, int]]) -> bool:
        """Whether the same measurements, or the same operator that takes them, come in again and again.

        Args:
            spans: the first and last time of each stage, in order.

        Returns:
            Whether a tensor that exists before the first stage, and is not a weight, is read for two or more of the
            later stages. With only two stages, it must be read for both; if weights took part in computing it, reading
            it in a residual or skip connection does not count.
        """
        edges = [START, *(end for _, end in spans)]
        windows = list(zip(edges, edges[1:]))

        def num_windows(times: Sequence[int], first: int) -> int:
            return sum(any(start < time <= end for time in times) for start, end in windows[first:])

        for origin in self._origins:
            is_weight = origin.made == START and origin.learned
            if origin.made >= spans[0][0] or is_weight:
                continue
            if len(spans) == 2:
                found = num_windows(origin.used if origin.learned else origin.read, 0) == 2
            else:
                found = num_windows(origin.read, 1) > 1
            if found:
                return True
        return False

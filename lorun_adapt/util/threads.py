"""Use no more threads than make the CPU faster.

The threads of an operation wait for each other, and take time from each other while they do. Where other work runs on
the machine, where a virtual machine shows the two hyperthreads of one core as two cores, and where a container shows
cores that it may not use, a training step may take twice as long with two threads as with one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

REPEATS = 12  # whose sum counts: threads that wait for a core are slow at times, and fast in between
ENOUGH = 0.5  # seconds after which a comparison ends early
FASTER = 1.2  # times as fast: half of the threads never are if each thread has its own core
RARELY = 50.0  # times the seconds that trials took pass before the next ones


class _Trials:
    """What is tried out now: torch has one number of threads for a process, so there is one of these."""

    most = 1  # torch's own number of threads
    next = math.inf  # when to try again, by ``time.monotonic()``


@contextmanager
def helpful_threads() -> Iterator[None]:
    """Within the block, torch uses as many threads as are fastest on this machine now: its own number, or fewer.

    One thread is tried, then about two, four and so on, until twice as many are slower. Each comparison ends after half
    a second. Nothing is tried if the user has set ``OMP_NUM_THREADS``, or in a block within such a block. Afterwards,
    torch has as many threads as before.

    >>> import torch
    >>> before = torch.get_num_threads()
    >>> with helpful_threads():
    ...     print(1 <= torch.get_num_threads() <= before)
    True
    """
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ or before == 1 or _Trials.next < math.inf:
        yield
        return
    try:
        _Trials.most, _Trials.next = before, time.monotonic()
        try_threads_again()
        yield
    finally:
        _Trials.next = math.inf
        torch.set_num_threads(before)


def try_threads_again() -> None:
    """Within such a block, try the numbers of threads again if it is time: other work may have begun, or ended."""
    started = time.monotonic()
    if started < _Trials.next:
        return
    numbers = [_Trials.most]
    while numbers[0] > 1:
        numbers.insert(0, numbers[0] // 2)
    # From few to many: where a container has two cores and shows 64, an operation of 64 threads may take seconds.
    threads = numbers[0]
    for more in numbers[1:]:
        if _is_slower(more, threads):
            break
        threads = more
    torch.set_num_threads(threads)
    ended = time.monotonic()
    _Trials.next = ended + RARELY * (ended - started)


def _is_slower(many: int, few: int) -> bool:
    """Whether many threads take clearly longer than few. They take turns, so that other work counts for both."""
    seconds_of_many = seconds_of_few = 0.0
    for _ in range(REPEATS):
        seconds_of_many += _seconds_with(many)
        seconds_of_few += _seconds_with(few)
        if seconds_of_many + seconds_of_few > ENOUGH:
            break
    return seconds_of_many >= FASTER * seconds_of_few


def _seconds_with(threads: int) -> float:
    """What the forward and the backward of a usual convolution take."""
    torch.set_num_threads(threads)
    with torch.enable_grad():
        image, kernel = torch.ones(2, 32, 64, 64, requires_grad=True), torch.ones(32, 32, 3, 3, requires_grad=True)
        started = time.perf_counter()
        F.conv2d(image, kernel, padding=1).sum().backward()
        return time.perf_counter() - started

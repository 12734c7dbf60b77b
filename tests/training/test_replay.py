"""Batches that are used in several steps: which, in which order, and how many are kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from recovery_runs import measurements, teacher
from torch import Tensor

import lorun_adapt
from lorun_adapt.network.batches import Batch
from lorun_adapt.training.replay import Replay


def numbered() -> Iterator[Batch]:
    return ((torch.full((2,), float(number)),) for number in itertools.count())


class Counting:
    """Returns a batch's number and seed, and remembers how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[float, int]] = []

    def __call__(self, batch: Batch, seed: int) -> tuple[float, int]:
        self.asked.append((float(batch[0][0]), seed))
        return self.asked[-1]


def test_every_third_step_has_a_new_batch_and_nothing_is_computed_twice() -> None:
    compute = Counting()
    replay = Replay(numbered(), compute, seed=5, stride=2)
    order = [replay.for_step(step) for step in range(60)]
    assert order[::3] == [(number, 5 + 2 * number) for number in range(20)]
    assert sorted(compute.asked) == [(number, 5 + 2 * number) for number in range(20)]
    assert all(number <= step // 3 for step, (number, _) in enumerate(order))
    assert len({number for number, _ in order[40:]} - {float(n) for n in range(13, 20)}) > 2  # old ones come again


def test_a_resumed_run_has_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorun_adapt.training.replay.MAX_BYTES", 7 * 8)
    whole, resumed = (Replay(numbered(), Counting(), seed=1) for _ in range(2))
    order = [whole.for_step(step) for step in range(90)]
    assert [resumed.for_step(step) for step in range(50, 90)] == order[50:]
    assert all(number > step // 3 - 7 for step, (number, _) in enumerate(order))  # seven are kept


def test_what_was_computed_first_is_kept_for_the_steps() -> None:
    compute = Counting()
    replay = Replay(numbered(), compute, seed=0)
    list(itertools.islice(replay.first(), 4))
    for step in range(12):
        replay.for_step(step)
    assert [number for number, _ in compute.asked] == [0, 1, 2, 3]


def test_a_batch_with_nan_is_used_once() -> None:
    batches = ((torch.full((2,), float("nan") if number == 1 else float(number)),) for number in itertools.count())
    replay = Replay(batches, Counting(), seed=0)
    order = [replay.for_step(step)[0] for step in range(30)]
    assert [step for step, number in enumerate(order) if number != number] == [3]


def energy(output: Tensor, batch: Batch) -> Tensor:
    return output.square().mean()


@pytest.mark.parametrize("loss", [None, energy])
def test_the_teacher_runs_for_every_third_step(loss) -> None:
    net, student, runs = teacher(), teacher(), []
    net.register_forward_hook(lambda *_: runs.append(1))
    lorun_adapt.fit(student, measurements(40), teacher=net, loss=loss, steps=60)
    assert 20 <= len(runs) < 30  # beside the steps, to find out what matters, and for the held-out batches

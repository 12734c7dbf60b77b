"""Batches that are used in several steps: which, in which order, and how many are kept."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator

import pytest
import torch
from recovery_runs import measurements, teacher
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt.network.batches import Batch
from lorun_adapt.training.replay import Replay
from lorun_adapt.training.trainer import Trainer


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


def test_resuming_keeps_no_more_batches_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorun_adapt.training.replay.MAX_BYTES", 7 * 8)
    alive: list[weakref.ref[Tensor]] = []

    def batches() -> Iterator[Batch]:
        for batch in numbered():
            alive.append(weakref.ref(batch[0]))
            yield batch

    replay = Replay(batches(), Counting(), seed=1)
    replay.for_step(9000)
    assert len(alive) == 3001 and sum(tensor() is not None for tensor in alive) <= 8


def test_large_batches_after_a_small_one_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorun_adapt.training.replay.MAX_BYTES", 50_000)

    def batches() -> Iterator[Batch]:
        return ((torch.full((10 if number == 0 else 1000,), float(number)),) for number in itertools.count())

    def order(first: int, last: int, early: int = 0) -> list[float]:
        alive.clear()
        replay = Replay(batches(), compute, seed=1)
        list(itertools.islice(replay.first(), early))
        found = []
        for step in range(first, last):
            found.append(float(replay.for_step(step)[0]))
            assert sum(tensor() is not None for tensor in alive) <= 7  # each takes 8,000 bytes with its batch
        return found

    def compute(batch: Batch, seed: int) -> Tensor:
        alive.append(weakref.ref(item := batch[0] + 0))
        return item

    alive: list[weakref.ref[Tensor]] = []
    whole = order(0, 90)
    assert order(50, 90) == whole[50:] and order(0, 90, early=9) == whole
    assert len(set(whole[60:])) > 10


def test_a_batch_that_is_left_out_comes_again_only_where_there_is_no_other() -> None:
    replay = Replay(numbered(), Counting(), seed=0)
    order = []
    for step in range(60):
        order.append(replay.for_step(step)[0])
        assert replay.last == order[-1]
        if replay.last in (0, 4) and replay.last not in replay.left_out:
            replay.left_out.append(replay.last)
    assert order[:3] == [0, 0, 0] and order.count(0) == 3 and order.count(4) == 1


class Dividing(nn.Module):
    """Divides by the energy of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = teacher()

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        return self.net(y, mask) * (y.square().sum() / y.square().sum())


def test_a_batch_that_gives_nan_costs_one_return(monkeypatch: pytest.MonkeyPatch) -> None:
    net, student = Dividing(), Dividing()
    net.net.blocks[0].denoiser.head.weight.data.mul_(1.1)
    batches = measurements(40)
    batches[3] = torch.zeros_like(batches[3][0]), batches[3][1]
    rates, step = [], Trainer._step

    def watched(self, *arguments):
        rates.append(self.run.rate_factor)
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", watched)
    with pytest.warns(UserWarning, match="half the learning rate"):
        lorun_adapt.fit(student, batches, teacher=net, steps=100)
    assert set(rates) == {1.0, 0.5}


def energy(output: Tensor, batch: Batch) -> Tensor:
    return output.square().mean()


@pytest.mark.parametrize("loss", [None, energy])
def test_the_teacher_runs_for_every_third_step(loss) -> None:
    net, student, runs = teacher(), teacher(), []
    net.register_forward_hook(lambda *_: runs.append(1))
    lorun_adapt.fit(student, measurements(40), teacher=net, loss=loss, steps=60)
    assert 20 <= len(runs) < 30  # beside the steps, to find out what matters, and for the held-out batches


class Counted(nn.Module):
    """Does not return the same again for the same batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.runs = teacher(), 0

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        self.runs += 1
        return self.net(y, mask) * (1 + 0.01 * (self.runs % 5))


def test_a_teacher_that_does_not_repeat_itself_runs_in_every_step() -> None:
    net, student = Counted(), Counted()
    for parameter in student.parameters():
        parameter.data.mul_(0.7)
    lorun_adapt.fit(student, measurements(40), teacher=net, steps=60)
    assert net.runs >= 60


def test_batches_of_workers_leave_shared_memory() -> None:
    def shared() -> Iterator[Batch]:
        return ((torch.full((2,), float(number)).share_memory_(),) for number in itertools.count())

    kept: list[Batch] = []
    replay = Replay(shared(), lambda batch, seed: kept.append(batch), seed=0)
    replay.for_step(0)
    assert not kept[0][0].is_shared() and kept[0][0].tolist() == [0, 0]

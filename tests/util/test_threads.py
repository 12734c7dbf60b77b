"""How many threads torch uses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import lorun_adapt
from lorun_adapt.task.evaluate import evaluate
from lorun_adapt.task.restore import restore_files, restore_measurements
from lorun_adapt.task.task import load_task
from lorun_adapt.util import threads
from lorun_adapt.util.threads import helpful_threads, try_threads_again
from lorun_adapt.util.toy import ToyUnfoldingNet

TASK = """
patch = 16
def build(): ...
def measure(images, sigma=0.0): return (images,)
def restore(output, images): return output
"""
CORES = {1: 0.08, 2: 0.04, 4: 0.02, 8: 0.01}  # seconds with so many threads: a core for each,
HYPERTHREADS = CORES | {8: 0.04}  # or one for two


@pytest.fixture(autouse=True)
def eight_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(8)
    yield
    torch.set_num_threads(1)


def take(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float]) -> list[int]:
    """Let numbers of threads take ``seconds``; return those that are tried."""
    tried: list[int] = []

    def seconds_with(number: int) -> float:
        tried.append(number)
        torch.set_num_threads(number)
        return seconds[number]

    monkeypatch.setattr(threads, "_seconds_with", seconds_with)
    return tried


@pytest.mark.parametrize(
    ("seconds", "number"),
    [
        (CORES, 8),
        (CORES | {8: 0.022}, 8),  # 4 are faster by less than what times vary by
        (HYPERTHREADS, 4),
        ({1: 0.01, 2: 0.02}, 1),  # a container with one core, where more threads are not even tried
    ],
)
def test_threads_are_doubled_until_they_are_slower(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float], number: int
) -> None:
    take(monkeypatch, seconds)
    with helpful_threads():
        assert torch.get_num_threads() == number
    assert torch.get_num_threads() == 8


def test_any_number_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(6)
    tried = take(monkeypatch, {1: 0.06, 3: 0.02, 6: 0.01})
    with helpful_threads():
        assert torch.get_num_threads() == 6 and set(tried) == {1, 3, 6}


def test_times_count_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that wait for a core are slow at times only."""
    take(monkeypatch, CORES)
    usual, turns = threads._seconds_with, iter(range(10_000))
    monkeypatch.setattr(
        threads,
        "_seconds_with",
        lambda number: 10 * usual(number) if number == 8 and not next(turns) % 4 else usual(number),
    )
    with helpful_threads():
        assert torch.get_num_threads() == 4


def test_they_are_tried_again_when_it_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(threads.time, "monotonic", lambda: now[0])

    def slow(number: int) -> float:
        now[0] += threads.ENOUGH
        torch.set_num_threads(number)
        return threads.ENOUGH

    monkeypatch.setattr(threads, "_seconds_with", slow)
    with helpful_threads():
        assert torch.get_num_threads() == 8
        assert now == [100.0 + 6 * threads.ENOUGH], "three pairs, each of which takes enough time to tell"
        tried = take(monkeypatch, HYPERTHREADS)
        now[0] += 6 * threads.ENOUGH * threads.RARELY - 1
        try_threads_again()
        assert not tried and torch.get_num_threads() == 8
        now[0] += 1
        try_threads_again()
        assert torch.get_num_threads() == 4, "other work has begun"
        take(monkeypatch, CORES)
        now[0] += 1
        try_threads_again()
        assert torch.get_num_threads() == 8, "and has ended"
        tried = take(monkeypatch, HYPERTHREADS)
    now[0] += 1
    try_threads_again()
    assert not tried, "the block is over"


def test_a_block_within_a_block_leaves_the_choice_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, HYPERTHREADS)
    with helpful_threads():
        tried = take(monkeypatch, {1: 0.01, 2: 0.02})
        with helpful_threads():
            assert torch.get_num_threads() == 4 and not tried
        assert torch.get_num_threads() == 4
    assert torch.get_num_threads() == 8


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = take(monkeypatch, HYPERTHREADS)
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    with helpful_threads():
        try_threads_again()
        assert torch.get_num_threads() == 8 and not tried


def test_threads_are_as_before_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    take(monkeypatch, HYPERTHREADS)
    with pytest.raises(ValueError, match="in the block"), helpful_threads():
        raise ValueError("in the block")
    assert torch.get_num_threads() == 8


def test_real_times_are_taken_without_gradients_too() -> None:
    with torch.no_grad(), helpful_threads():
        assert torch.get_num_threads() in (1, 2, 4, 8)
    assert torch.get_num_threads() == 8


@pytest.mark.parametrize(
    ("duration", "number"),
    [({"minutes": 0.02}, 4), ({"steps": 2}, 8)],
    ids=["minutes", "steps"],  # a number of steps is to give the same weights each time
)
def test_training_on_a_clock_uses_them(
    monkeypatch: pytest.MonkeyPatch, duration: dict[str, float], number: int
) -> None:
    take(monkeypatch, HYPERTHREADS)
    seen = set()

    class Watched(ToyUnfoldingNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.add(torch.get_num_threads())
            return super().forward(x)

    net = Watched(stages=3)
    lorun = lorun_adapt.convert(net, rank=1)
    seen.clear()
    lorun.recover(net, [torch.rand(2, 1, 8, 8)], **duration)
    assert seen == {number} and torch.get_num_threads() == 8


def test_images_are_restored_with_the_fastest_number(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    take(monkeypatch, HYPERTHREADS)
    used: list[int] = []

    class Net(nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            used.append(torch.get_num_threads())
            return x

    (tmp_path / "task.py").write_text(TASK)
    task = load_task(tmp_path / "task.py")
    Image.fromarray(np.full((16, 16), 128, np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "y.npy", np.full((1, 1, 16, 16), 0.5, np.float32))
    evaluate(task, [tmp_path / "a.png"], Net(), None)
    restore_files(task, Net(), [tmp_path / "a.png"], tmp_path / "out")
    restore_measurements(task, Net(), {"x": True}, [tmp_path / "y.npy"], tmp_path / "measured")
    assert used == [4, 4, 4]
    assert torch.get_num_threads() == 8

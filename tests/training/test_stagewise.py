"""Teacher forcing: each stage trains by itself on the teacher's inputs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from dun_zoo import Case, Denoiser
from recovery_runs import launch, measurements, teacher
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt.network.batches import Batches
from lorun_adapt.network.observe import Observer
from lorun_adapt.network.recording import Recorder, denoiser_at
from lorun_adapt.stages.stage_map import StageMap
from lorun_adapt.training.replay import Replay
from lorun_adapt.training.stagewise import TeacherForcing


def recorder_of(net: nn.Module, stage_map: StageMap, batch: tuple[Any, ...]) -> Recorder:
    return Recorder(net, stage_map, Observer(net, stage_map, batch), batch)


def test_every_stage_of_every_shape_runs_alone(case: Case) -> None:
    """The exact conversion's stages return what the original's return, and their errors have gradients."""
    lorun = lorun_adapt.convert(case.net, rank=10_000, **case.find())
    stage_map = lorun.stage_map
    recorder = recorder_of(case.net, stage_map, case.inputs)
    assert len(recorder.sites) == (sum(len(group.sites) for group in stage_map.groups) if case.alone else 0)
    if not case.alone:
        return
    calls = recorder.record(case.inputs, 0)
    assert [call.site for call in calls] == recorder.sites
    forcing = TeacherForcing(lorun.network, recorder, Replay(Batches([case.inputs]), recorder.record, 0))
    assert forcing.error([calls]) < 1e-6
    lorun.base.requires_grad_(True)
    for call in calls:
        own = {id(p) for p in denoiser_at(lorun.network, call.site).parameters()}
        others = [p for p in lorun.parameters() if id(p) not in own]
        lorun.zero_grad()
        forcing.backward([call], 1, torch.Tensor.backward)
        assert all(p.grad is None for p in others)


def test_the_error_is_relative_to_what_a_stage_changes() -> None:
    net = teacher()
    lorun = lorun_adapt.convert(net, rank=1)
    batch = measurements()[0]
    calls = recorder_of(net, lorun.stage_map, batch).record(batch, 0)
    x, y, mask = batch[0], *batch
    with torch.no_grad():
        for call, block in zip(calls, net.blocks):
            after = block(x, y, mask)
            assert torch.equal(call.outputs[0], after)
            nearest = min(float((after - before).square().sum()) for before in (x, y))
            assert call.changes == [pytest.approx(nearest, rel=1e-5)]
            x = after


class Remembering(nn.Module):
    """A stage that remembers what it took last, whichever forward that was in."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Denoiser()
        self.last: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        again, self.last = self.last == float(x.detach().mean()), float(x.detach().mean())
        return self.denoiser(x) * (1.1 if again else 1.0)


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.denoiser = Denoiser()

    def forward(self, x: Tensor) -> Tensor:
        return self.denoiser(x + 0.1 * torch.randn_like(x))


class TwoRuns(nn.Module):
    """Runs each of its stages twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Denoiser() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(block(x))
        return x


@pytest.mark.parametrize("kind", [Remembering, Noisy, TwoRuns])
def test_stages_that_cannot_run_alone_are_skipped(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = TwoRuns() if kind is TwoRuns else nn.Sequential(*(kind() for _ in range(3)))
    batches = [torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    lorun = lorun_adapt.convert(net.eval(), rank=1, stages="blocks.*" if kind is TwoRuns else "*")
    assert recorder_of(net, lorun.stage_map, (batches[0],)).sites == []

    def error() -> float:
        with torch.no_grad():
            outputs = []
            for network in (copy.deepcopy(lorun), copy.deepcopy(net)):
                network(batches[1])  # so that both remember the same
                torch.manual_seed(1)
                outputs.append(network(batches[0]))
        return float((outputs[0] - outputs[1]).square().mean())

    start = error()
    assert lorun.recover(net, batches, steps=60)
    assert error() < 0.8 * start


def test_batches_repeat_and_come_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    net = teacher()
    batches = measurements(8)
    stage_map = lorun_adapt.find_stages(net)
    recorder = recorder_of(net, stage_map, batches[0])

    def drawn(steps: int) -> list[int]:
        recordings = Replay(Batches(batches), recorder.record, 3)
        firsts = [recordings.for_step(step)[0].outputs[0] for step in range(steps)]
        known = [recorder.record(batch, 0)[0].outputs[0] for batch in batches]
        return [next(i for i, other in enumerate(known) if torch.equal(first, other)) for first in firsts]

    order = drawn(12)
    assert order == drawn(12) and order[::3] == [0, 1, 2, 3]
    assert all(index <= step // 3 for step, index in enumerate(order))
    monkeypatch.setattr("lorun_adapt.training.replay.MAX_BYTES", 1)
    assert drawn(6) == [0, 0, 0, 1, 1, 1]


def test_large_outputs_train_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    net, batch = teacher(), measurements()[0]
    stage_map = lorun_adapt.find_stages(net)
    recorder = recorder_of(net, stage_map, batch)
    forcing = TeacherForcing(net, recorder, Replay(Batches([batch]), recorder.record, 0))
    assert len(forcing.for_step(0)) == 3
    monkeypatch.setattr("lorun_adapt.training.stagewise.MAX_NUMBERS", 4 * 64)
    stages = [call.site.stage for step in range(6) for call in forcing.for_step(step)]
    assert stages == [0, 1, 2, 0, 1, 2]


TIMED = """
import sys
import time
import torch
from safetensors.torch import save_file
import lorun_adapt
from lorun_adapt.cli.demo import shipped
from lorun_adapt.task.task import load_task
from lorun_adapt.training.processes import process_state
from lorun_adapt.training.trainer import Trainer

torch.set_num_threads(1)
ended = []
step = Trainer._step

def timed(self, phase, *arguments):
    value = step(self, phase, *arguments)
    ended.extend([(time.process_time(), time.monotonic())] * (phase.forcing is not None))
    return value

Trainer._step = timed
task = load_task(str(shipped("examples/compressive_sensing.py")))
net = task.build()
task.load_weights(net, None)
generator = torch.Generator().manual_seed(0)
batches = [task.measure(torch.rand(8, 1, 33, 33, generator=generator)) for _ in range(12)]
lorun = lorun_adapt.convert(net, rank=8)
lorun.recover(net, batches, steps=32)
if process_state().is_main_process:
    save_file({"seconds": torch.tensor(ended[18]) - torch.tensor(ended[0])}, sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_on_two_cores_are_faster_than_one_on_one(tmp_path) -> None:
    """By the processor time of a process, as other tests may run beside this one."""
    seconds: dict[int, list[Tensor]] = {1: [], 2: []}
    for _ in range(2):
        for processes in seconds:
            seconds[processes].append(launch(TIMED, tmp_path, processes)["seconds"])
    one, two = (torch.stack(values).min(0).values for values in seconds.values())
    print(f"two processes are {one[0] / two[0]:.2f} times as fast as one, {one[1] / two[1]:.2f} by the clock")
    assert one[0] > 1.5 * two[0]

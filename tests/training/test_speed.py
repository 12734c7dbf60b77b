"""How recovery runs fast on a CPU: convolutions channels last, and in bfloat16 where the CPU multiplies in it."""

from __future__ import annotations

import math
import platform
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from dun_zoo import Block, Denoiser, ListOfBlocks
from recovery_runs import Stopping, distance, measurements, same, teacher, values
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt.training import speed
from lorun_adapt.training import trainer as training
from lorun_adapt.training.trainer import Trainer


@pytest.fixture
def bfloat16_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_multiplies_in_bfloat16", lambda: True)
    monkeypatch.setattr(speed, "LONGER", math.inf)  # without such units, steps do take longer


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, set[bool]]]:
    """For each step of training: whether it ran in bfloat16, and whether kernels were channels last."""
    seen: list[tuple[bool, set[bool]]] = []
    step = Trainer._step

    def watched(self: Trainer, *arguments: Any) -> float:
        networks = self.objective.networks
        kernels = [p for net in networks for p in net.parameters() if p.ndim == 4 and min(p.shape[:2]) > 1]
        order = {p.is_contiguous(memory_format=torch.channels_last) for p in kernels}
        seen.append((self.run.bfloat16, order))
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", watched)
    return seen


class ComplexNumbers(Denoiser):
    """Has an operation that knows no bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        head = self.head(x)
        return super().forward(x) + torch.complex(head, head).real.mean(1, keepdim=True)


class Flattening(Denoiser):
    """Takes for granted in which order activations lie."""

    def forward(self, x: Tensor) -> Tensor:
        body = self.body(torch.relu(self.head(x)))
        return x + 0.1 * self.tail(torch.relu(body.view(len(x), -1).view(body.shape)))


def network(denoiser: type[Denoiser] = Denoiser) -> nn.Module:
    torch.manual_seed(0)
    return ListOfBlocks([Block(denoiser()) for _ in range(3)]).eval()


@pytest.mark.parametrize("denoiser, runs", [(Denoiser, True), (ComplexNumbers, False)])
def test_networks_that_run_in_bfloat16_train_in_it(denoiser, runs, bfloat16_units, steps) -> None:
    net = network(denoiser)
    lorun = lorun_adapt.convert(net, rank=1)
    before = distance(lorun, net)
    lorun.recover(net, measurements(), steps=25)
    assert [low for low, _ in steps[:3]] == [runs] * 3 and len(steps) == 25
    assert distance(lorun, net) < 0.5 * before
    assert all(tensor.dtype == torch.float32 for tensor in lorun.state_dict().values())


def test_it_ends_where_rounding_would_hide_what_is_left(bfloat16_units, steps, monkeypatch) -> None:
    monkeypatch.setattr(training, "MARGIN", 27)  # small networks of smooth functions round well
    net = network()
    lorun = lorun_adapt.convert(net, rank=2)
    lorun.recover(net, measurements(), steps=100)
    assert steps[0][0] and not steps[-1][0]
    steps.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two steps may find nothing better
        lorun.recover(net, measurements(), steps=2)
    assert not any(low for low, _ in steps)


def test_it_repeats_and_resumes_to_the_bit(bfloat16_units, steps, tmp_path) -> None:
    net, checkpoint = teacher(), tmp_path / "state.safetensors"
    runs = [lorun_adapt.convert(net, rank=1) for _ in range(3)]
    for lorun in runs[:2]:
        lorun.recover(net, Stopping(-1, "exception"), steps=30)
    assert same(values(runs[0]), values(runs[1])) and steps[0][0]
    with pytest.warns(UserWarning, match="stopped"):
        runs[2].recover(net, Stopping(11, "exception"), steps=30, resume_from=checkpoint)
    runs[2].recover(net, Stopping(-1, "exception"), steps=30, resume_from=checkpoint)
    assert same(values(runs[2]), values(runs[0]))


@pytest.mark.parametrize("denoiser, runs", [(Denoiser, True), (Flattening, False)])
def test_convolutions_are_channels_last_while_they_train(denoiser, runs, steps) -> None:
    net = network(denoiser)
    lorun = lorun_adapt.convert(net, rank=1)
    before = distance(lorun, net)
    held = [*net.parameters(), *lorun.parameters()]
    places = [p.data_ptr() for p in held]
    weights = [p.clone() for p in net.parameters()]
    lorun.recover(net, measurements(), steps=25)
    assert all(order == {runs} for _, order in steps) and len(steps) == 25
    assert distance(lorun, net) < 0.5 * before
    assert [p.data_ptr() for p in held] == places and all(p.is_contiguous() for p in held)
    assert all(torch.equal(p, old) for p, old in zip(net.parameters(), weights))


FAULTS = """
import sys, torch
from resource import RUSAGE_SELF, getrusage
from lorun_adapt.cli import main as cli
cli.cli = lambda **_: None
if sys.argv[1] == "command":
    cli.main()
faults = []
for _ in range(40):
    torch.ones(10 << 20)
    faults.append(getrusage(RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[-11])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="keeps memory where the C library is GNU's")
def test_commands_keep_the_memory_that_tensors_free() -> None:
    """Ten tensors of 40 MB, each in the place of the one before."""
    command, without = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, check=True).stdout)
        for how in ("command", "without")
    )
    assert command < without / 10

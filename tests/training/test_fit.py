"""``lorun_adapt.fit``: any network, in the way that conversions train."""

from __future__ import annotations

import copy
import signal

import pytest
import torch
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.training.stopping import interruptible
from lorun_adapt.util.toy import ToyUnfoldingNet

BATCHES = [torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def disturbed(net: nn.Module) -> nn.Module:
    """A copy whose weights are off a little."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return net


def distance(net: nn.Module, teacher: nn.Module) -> float:
    with torch.no_grad():
        return sum(float((net(y) - teacher(y)).square().mean()) for y in BATCHES)


def test_a_network_learns_from_its_teacher() -> None:
    teacher = ToyUnfoldingNet()
    students = [disturbed(teacher) for _ in range(2)]
    students[1].load_state_dict(students[0].state_dict())
    before = distance(students[0], teacher)
    weights = copy.deepcopy(teacher.state_dict())
    for student in students:
        student.train()
        stage_map = lorun_adapt.find_stages(teacher)
        assert lorun_adapt.fit(student, BATCHES, teacher=teacher, stage_map=stage_map, steps=40)
        assert student.training and all(p.requires_grad and p.grad is None for p in student.parameters())
    assert distance(students[0], teacher) < 0.2 * before
    pairs = zip(students[0].parameters(), students[1].parameters())
    assert all(torch.equal(one, other) for one, other in pairs)  # the same seed, the same weights
    assert all(torch.equal(tensor, weights[name]) for name, tensor in teacher.state_dict().items())


def test_a_student_that_returns_another_shape_is_refused() -> None:
    class Flat(ToyUnfoldingNet):
        def forward(self, y: Tensor) -> Tensor:
            return super().forward(y)[:, 0]

    with pytest.raises(LoRunError, match=r"expected outputs of shape \[\(2, 1, 8, 8\)\].*found \[\(2, 8, 8\)\]"):
        lorun_adapt.fit(Flat(), BATCHES, teacher=ToyUnfoldingNet(), steps=2)


def test_only_the_named_parameters_train() -> None:
    net = ToyUnfoldingNet()
    before = copy.deepcopy(net.state_dict())
    trained = [(net.stages[0].conv1.weight, 0.05), (net.stages[2].step, 0.01)]
    pairs = [(y, 0.5 * y) for y in BATCHES]

    def loss(output: Tensor, batch: tuple[Tensor, ...]) -> Tensor:
        return (output - batch[1]).square().mean()

    assert lorun_adapt.fit(net, pairs, trained, loss=loss, held_out=pairs[:1], patience=5, steps=20)
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"stages.0.conv1.weight", "stages.2.step"}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_what_cannot_be_trained_is_refused() -> None:
    net, teacher = ToyUnfoldingNet(), ToyUnfoldingNet()
    step = net.stages[0].step
    with pytest.raises(LoRunError, match="nothing to minimise: give loss="):
        lorun_adapt.fit(net, BATCHES, steps=1)
    with pytest.raises(LoRunError, match="expected learning rates above 0, found 0"):
        lorun_adapt.fit(net, BATCHES, [(step, 0)], teacher=teacher, steps=1)
    with pytest.raises(LoRunError, match=r"Sequential has no module 'stages\.0', where stage_map has a stage"):
        lorun_adapt.fit(nn.Sequential(net), BATCHES, teacher=teacher, stage_map=lorun_adapt.find_stages(net), steps=1)
    with pytest.raises(LoRunError, match="all held-out batches have NaN or Inf"):
        lorun_adapt.fit(net, BATCHES, teacher=teacher, held_out=[BATCHES[0] * torch.nan], steps=1)
    step.requires_grad_(False)
    with pytest.raises(LoRunError, match=r"of shape \(\) that is to be trained is frozen"):
        lorun_adapt.fit(net, BATCHES, [(step, 0.1)], teacher=teacher, steps=1)
    with pytest.raises(LoRunError, match="no parameter of ToyUnfoldingNet has requires_grad"):
        lorun_adapt.fit(net.requires_grad_(False), BATCHES, teacher=teacher, steps=1)


def test_adapters_that_start_at_zero_have_the_learning_rates_of_trained_ones() -> None:
    net = ToyUnfoldingNet()
    lorun = lorun_adapt.convert(net, rank=2, share=False)
    zeros = [p for name, p in lorun.named_parameters() if name.endswith("lora_B") and not p.any()]
    assert lorun_adapt.fit(lorun, BATCHES, [(p, 0.02) for p in zeros], teacher=disturbed(net), steps=20)
    # Steps relative to a fixed small size, 0.01, could not take them beyond 20 * 0.02 * 0.01.
    assert zeros and max(float(p.detach().abs().max()) for p in zeros) > 10 * 20 * 0.02 * 0.01


@pytest.mark.parametrize("patience", [0, -1, 1.5, "a"])
def test_patience_that_is_no_number_of_checks(patience: object) -> None:
    with pytest.raises(LoRunError, match="expected patience of 1 or more checks, found"):
        lorun_adapt.fit(ToyUnfoldingNet(), BATCHES, teacher=ToyUnfoldingNet(), patience=patience, steps=1)


def test_a_parameter_that_is_listed_twice() -> None:
    net = ToyUnfoldingNet()
    with pytest.raises(LoRunError, match="a parameter is to be trained twice: list each once"):
        lorun_adapt.fit(net, BATCHES, [(net.stages[0].step, 0.1)] * 2, teacher=ToyUnfoldingNet(), steps=1)


def test_gradients_of_what_does_not_train_stay() -> None:
    net = ToyUnfoldingNet()
    gradient = net.stages[1].step.grad = torch.ones(())
    assert lorun_adapt.fit(net, BATCHES, [(net.stages[0].step, 0.1)], teacher=ToyUnfoldingNet(), minutes=0.02)
    assert net.stages[1].step.grad is gradient


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As in a command that a script has started with ``&``."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible() as stop:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            signal.raise_signal(signal.SIGINT)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGINT, before)

"""Stages that run again in the backward pass."""

from __future__ import annotations

import pytest
import torch
from dun_zoo import ZOO, Block, Case, Denoiser, ListOfBlocks
from recovery_runs import measurements, same, saved_storages, teacher, values
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.network.recording import denoiser_at
from lorun_adapt.training.recompute import recomputing


def denoisers(lorun: lorun_adapt.LoRunModel) -> list[nn.Module]:
    sites = [site for group in lorun.stage_map.groups for site in group.sites]
    return [denoiser_at(lorun.network, site) for site in sites]


def test_gradients_are_the_same_for_every_shape(case: Case) -> None:
    lorun = lorun_adapt.convert(case.net, rank=1, **case.find())
    lorun.base.requires_grad_(True)

    def gradients() -> list[Tensor]:
        lorun.zero_grad()
        lorun(*case.inputs).square().mean().backward()
        return [p.grad.clone() for p in lorun.parameters() if p.grad is not None]

    plain = gradients()
    with recomputing(denoisers(lorun)):
        again = gradients()
    assert len(plain) == len(again) > 0
    assert all(float((a - b).norm()) <= 1e-6 * float(a.norm()) for a, b in zip(plain, again))
    assert not any("forward" in vars(module) for module in denoisers(lorun))


def saved_bytes(lorun: lorun_adapt.LoRunModel, batch: tuple[Tensor, ...]) -> int:
    """How many bytes a forward keeps for the backward pass, parameters and inputs aside."""
    held = {p.untyped_storage().data_ptr() for p in (*lorun.parameters(), *batch)}
    kept = saved_storages(lambda: lorun(*batch).square().mean())
    return sum(size for pointer, size in kept.items() if pointer not in held)


def test_memory() -> None:
    stages = 9
    torch.manual_seed(0)
    net = ListOfBlocks([Block(Denoiser(16)) for _ in range(stages)]).eval()
    lorun = lorun_adapt.convert(net, rank=1)
    lorun.base.requires_grad_(True)
    batch = (torch.rand(4, 1, 32, 32), torch.ones(1, 1, 32, 32))
    plain = saved_bytes(lorun, batch)
    with recomputing(denoisers(lorun)):
        less = saved_bytes(lorun, batch)
    inputs = stages * batch[0].nbytes  # what each stage takes is kept, though not by autograd's hooks
    assert less + inputs <= 2 / stages * plain + plain / stages


def test_recovery_and_fine_tuning_take_the_same_steps() -> None:
    net = teacher()
    runs = []
    for recompute in (False, True):
        lorun = lorun_adapt.convert(net, rank=1, calibration=measurements(), steps=10, recompute=recompute)
        lorun.finetune(measurements(), "other", teacher=net, steps=4, recompute=recompute)
        runs.append(values(lorun))
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(runs[0].values(), runs[1].values()))
    assert runs[0].keys() == runs[1].keys() and not same(runs[1], values(lorun_adapt.convert(net, rank=1)))


class Adding(Denoiser):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x) + y


class InPlace(nn.Module):
    """Each stage changes what the next one takes, after that one began."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Adding() for _ in range(3))

    def forward(self, y: Tensor) -> Tensor:
        x, y = y, y.clone()
        for block in self.blocks:
            x = block(x, y)
            y.mul_(0.5)
        return x


class InPlaceByName(InPlace):
    """The same for an argument that torch's own check does not see."""

    def forward(self, y: Tensor) -> Tensor:
        x, y = y, y.clone()
        for block in self.blocks:
            x = block(x, y=y)
            y.mul_(0.5)
        return x


@pytest.mark.parametrize("kind", [InPlace, InPlaceByName])
def test_inputs_that_change_in_place_are_refused(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    net = kind().eval()
    lorun = lorun_adapt.convert(net, rank=1, stages="blocks.*")
    with pytest.raises(LoRunError, match="the network changes a stage's input in place, .*: train without recompute"):
        lorun.recover(net, [torch.rand(2, 1, 8, 8)], steps=3, recompute=True)


def test_it_needs_calibration() -> None:
    with pytest.raises(LoRunError, match="recompute and resume_from need calibration"):
        lorun_adapt.convert(teacher(), rank=1, recompute=True)


class KeepsState(Block):
    """Adds a hidden state, which the network resets before each of two rounds."""

    state: Tensor | float = 0.0

    def forward(self, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        x = super().forward(x + self.state, y, mask)
        self.state = torch.tanh(x)
        return x


class TwoRounds(ListOfBlocks):
    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            block.state = torch.zeros_like(y)
        return super().forward(super().forward(y, mask), mask)


class Checkpointed(ListOfBlocks):
    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for block in self.blocks:
            x = checkpoint(block, x, y, mask, use_reentrant=False)
        return x


class WithinGrad(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.p = Denoiser()

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for _ in range(3):
            x = x - 0.5 * torch.func.grad(lambda z: (mask * z - y).square().sum() + self.p(z).sum())(x)
        return x


def test_where_torch_cannot_recompute() -> None:
    inputs = ZOO["list_of_blocks"]().inputs
    lorun = lorun_adapt.convert(WithinGrad(), rank=2, calls={"p": 3})
    with pytest.raises(LoRunError, match="within torch.func.grad or vjp, where torch cannot recompute: train without"):
        lorun.finetune([inputs] * 4, "new", steps=2, loss=lambda output, _: output.square().mean(), recompute=True)
    assert lorun.finetune([inputs] * 4, "new", steps=2, loss=lambda output, _: output.square().mean())


@pytest.mark.parametrize("network", [TwoRounds, Checkpointed])
def test_stages_that_cannot_run_twice_say_so(network: type[ListOfBlocks]) -> None:
    torch.manual_seed(0)
    kind = KeepsState if network is TwoRounds else Block
    net, inputs = network([kind(Denoiser()) for _ in range(3)]).eval(), ZOO["list_of_blocks"]().inputs
    lorun = lorun_adapt.convert(net, rank=2)
    with pytest.raises(LoRunError, match="a stage does something else when it runs again in the backward pass"):
        lorun.finetune([inputs] * 4, "new", steps=2, loss=lambda output, _: output.square().mean(), recompute=True)
    assert lorun.finetune([inputs] * 4, "new", steps=2, loss=lambda output, _: output.square().mean())

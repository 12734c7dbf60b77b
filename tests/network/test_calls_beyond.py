"""Networks that iterate until they converge: more calls than stages."""

from __future__ import annotations

import copy

import pytest
import torch
from dun_zoo import ZOO, Case, Looped
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunError


class UntilConverged(Looped):
    def forward(self, y: Tensor, mask: Tensor, loops: int = 3) -> Tensor:
        self.loops = loops
        return super().forward(y, mask)


def test_the_last_adapter_is_repeated_when_told() -> None:
    torch.manual_seed(0)
    case = Case(UntilConverged(), [])
    lorun = lorun_adapt.convert(case.net, rank=2, example_inputs=case.inputs, beyond="last")
    with torch.no_grad():
        for number, parameter in enumerate(lorun.parameters()):
            parameter.add_(0.01 * (number % 5))
    longer = lorun_adapt.convert(case.net, rank=2, calls={"p": 5})
    with torch.no_grad():
        longer.base.load_state_dict(lorun.base.state_dict())
        for stage in range(5):
            source = lorun.adapters["default"][f"stage_{min(stage, 2):02d}"]
            longer.adapters["default"][f"stage_{stage:02d}"].load_state_dict(source.state_dict())
    expected = longer(*case.inputs, 5)
    assert torch.equal(lorun(*case.inputs, 5), expected)
    assert torch.equal(copy.deepcopy(lorun)(*case.inputs, 5), expected)
    assert not torch.equal(lorun(*case.inputs, 3), expected)
    lorun.copy_adapter("default", "other")
    lorun.set_adapter("other")
    assert torch.equal(lorun(*case.inputs, 5), expected)
    lorun(*case.inputs, 5).sum().backward()
    lorun.beyond = "error"
    with pytest.raises(LoRunError, match="expected 3 calls of 'p' in a forward, found one more: .*beyond = \"last\""):
        lorun(*case.inputs, 5)


def test_wrong_choices_are_errors() -> None:
    case = ZOO["list_of_blocks"]()
    with pytest.raises(LoRunError, match="no stage of ListOfBlocks is called in a loop"):
        lorun_adapt.convert(case.net, rank=2, beyond="last")
    with pytest.raises(LoRunError, match="expected 'error' or 'last' for beyond, found 'first'"):
        lorun_adapt.convert(case.net, rank=2, beyond="first")


def test_torch_func_in_a_loop() -> None:
    """It allows no hooks on saved tensors, by which calls are told apart in recomputation."""

    class Energy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.denoiser = ZOO["looped"]().net.p

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - 0.05 * torch.func.grad(lambda z: self.denoiser(z).square().sum())(x)

    class Descent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = Energy()

        def forward(self, y: torch.Tensor) -> torch.Tensor:
            x = y
            for _ in range(3):
                x = self.step(x + 0.1 * y)
            return x

    net, y = Descent().eval(), torch.rand(1, 1, 8, 8)
    lorun = lorun_adapt.convert(net, rank=1, example_inputs=(y,))
    output = lorun(y)
    assert torch.equal(output, net(y)) and output.requires_grad
    output.sum().backward()
    assert any(p.grad is not None for p in lorun.parameters())


def test_a_choice_that_fails_is_not_kept() -> None:
    class Refusing:
        refuses = False

        def schedule(self, net: nn.Module, sigmas: object) -> None:
            if self.refuses:
                raise ValueError("no such noise")

    lorun = lorun_adapt.convert(UntilConverged(), rank=1, calls={"p": 3})
    lorun.set_noise("default", sigma=3)
    lorun.task = task = Refusing()
    task.refuses = True
    with pytest.raises(ValueError, match="no such noise"):
        lorun.beyond = "last"
    assert lorun.beyond == "error"

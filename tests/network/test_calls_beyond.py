"""Networks that iterate until they converge: more calls than stages."""

from __future__ import annotations

import copy

import pytest
import torch
from dun_zoo import ZOO, Case, Looped
from torch import Tensor

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

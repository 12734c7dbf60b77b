"""A number of times fewer operations: kept, and with the largest network that keeps it."""

from __future__ import annotations

import pytest
import torch
from dun_zoo import ZOO
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.network.operations import count_operations
from lorun_adapt.util.toy import ToyUnfoldingNet


class Wide(nn.Module):
    """Stages of one large kernel, and a head whose operations stay."""

    def __init__(self, stages: int = 4) -> None:
        super().__init__()
        self.head = nn.Conv2d(1, 64, 1)
        self.stages = nn.ModuleList(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)) for _ in range(stages))

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.head(x)
        for stage in self.stages:
            x = x + 0.1 * (y - x)
            x = x + stage(x).relu()
        return x


INPUTS = [torch.rand(1, 1, 8, 8)]


def share_of(lorun: lorun_adapt.LoRunModel, net: nn.Module) -> float:
    return count_operations(lorun, INPUTS) / count_operations(net, INPUTS)


@pytest.mark.parametrize("faster", [1.25, 2, 4.0, 10])
def test_operations_are_kept_to(faster: float) -> None:
    net = Wide()
    lorun = lorun_adapt.convert(net, faster=faster, example_inputs=INPUTS)
    assert share_of(lorun, net) <= 1 / faster and lorun.report().num_without_base == 1
    more = lorun_adapt.convert(net, budget=int(1.05 * lorun.num_parameters()) + 4 * (64 + 576))
    assert share_of(more, net) > 1 / faster and more.num_parameters() > lorun.num_parameters()


def test_with_calibration_and_after_saving(tmp_path) -> None:
    net = Wide()
    lorun = lorun_adapt.convert(net, faster=3, calibration=[torch.rand(2, 1, 8, 8) for _ in range(4)], steps=3)
    assert share_of(lorun, net) <= 1 / 3
    lorun.save_pretrained(tmp_path / "saved")
    assert share_of(lorun_adapt.from_pretrained(tmp_path / "saved", Wide()), net) <= 1 / 3


@pytest.mark.parametrize("faster", [1, 0.5, -2, float("inf"), float("nan"), True, "2"])
def test_no_such_speed(faster: object) -> None:
    with pytest.raises(LoRunError, match="expected a number above 1 for faster"):
        lorun_adapt.convert(Wide(), faster=faster, example_inputs=INPUTS)  # type: ignore[arg-type]


def test_more_than_there_is() -> None:
    with pytest.raises(LoRunError, match="1000 times fewer operations, as it takes 0.0[0-9]+ of the original's"):
        lorun_adapt.convert(Wide(), faster=1000, example_inputs=INPUTS)
    case = ZOO["list_of_blocks"]()  # kernels too small to be faster in two parts
    with pytest.raises(LoRunError, match="at rank 1: ask for less, or give a budget"):
        lorun_adapt.convert(case.net, faster=5, example_inputs=case.inputs)


def test_what_goes_with_it() -> None:
    with pytest.raises(LoRunError, match="pass example_inputs or calibration"):
        lorun_adapt.convert(Wide(), faster=2)
    with pytest.raises(LoRunError, match="budget and faster exclude each other"):
        lorun_adapt.convert(Wide(), faster=2, budget=0.5, example_inputs=INPUTS)
    with pytest.raises(LoRunError, match="share=False keeps"):
        lorun_adapt.convert(Wide(), faster=2, share=False, example_inputs=INPUTS)


def test_counting_changes_nothing_of_the_network() -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.ModuleList(
                nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)) for _ in range(3)
            )

        def forward(self, y: Tensor) -> Tensor:
            x = y
            for stage in self.stages:
                x = x + stage(x) + 0.1 * (y - x)
            return x

    net = Normalised().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    lorun_adapt.convert(net, faster=2, example_inputs=(torch.rand(2, 32, 8, 8),))
    assert net.training and all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_operations_of_stages_that_compute_gradients() -> None:
    class DataTerm(nn.Module):
        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return (nn.functional.avg_pool2d(z, 3, 1, 1) - y).square().sum()

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.term, self.body = DataTerm(), nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            with torch.enable_grad():
                z = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(self.term(z, y), z)
            return x - 0.3 * gradient + self.body(x).relu()

    net, y = ToyUnfoldingNet(), torch.rand(1, 32, 8, 8)
    net.stages = nn.ModuleList(Stage() for _ in range(3))
    lorun = lorun_adapt.convert(net, faster=1.5, example_inputs=(y,))
    assert count_operations(net, [y]) >= 1.5 * count_operations(lorun, [y]) > 0

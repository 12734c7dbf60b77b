"""Sets for noise levels: what is known of them, what travels with them, and the choice of one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from dun_zoo import Block, ListOfBlocks
from fine_tuning_runs import converted, levels, noisy, same
from torch import nn

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.files.layout import INTERPOLATED
from lorun_adapt.network.converted import AdapterInfo
from lorun_adapt.util.toy import ToyUnfoldingNet

BATCH = noisy(1)[0][:2]


# --- choosing ------------------------------------------------------------------------------------


def test_the_set_for_a_noise_level() -> None:
    lorun = levels(10, 50)
    assert lorun.select_adapter(50) == "sigma50"
    assert lorun.active_adapters == ["sigma50"]
    with pytest.warns(UserWarning, match="nearest, sigma10, which is for 10"):
        assert lorun.select_adapter(0) == "sigma10"
    lorun.add_weighted_adapter(["sigma10", "sigma50"], [0.625, 0.375], "expected")
    lorun.set_noise("expected")
    lorun.set_adapter("expected")
    expected = lorun(*BATCH)
    assert lorun.select_adapter(25) == INTERPOLATED and lorun.adapter_info[INTERPOLATED].sigma == 25
    assert torch.equal(lorun(*BATCH), expected)
    first = lorun.adapters[INTERPOLATED]
    assert lorun.select_adapter(25) == INTERPOLATED and lorun.adapters[INTERPOLATED] is first
    with torch.no_grad():
        for parameter in lorun.adapters["sigma10"].parameters():
            parameter.mul_(1.1)
    assert lorun.select_adapter(25) == INTERPOLATED and not torch.equal(lorun(*BATCH), expected)
    lorun.set_adapter("sigma10")
    lorun.copy_adapter("expected", "sigma20")
    lorun.set_noise("sigma20", sigma=20)
    expected = lorun(*BATCH)
    assert lorun.select_adapter(30) == INTERPOLATED and lorun.adapter_info[INTERPOLATED].sigma == 30
    assert not torch.equal(lorun(*BATCH), expected)
    lorun.set_adapter("sigma10", inference_mode=True)
    lorun.select_adapter(50)
    assert not any(p.requires_grad for p in lorun.parameters())  # as they were


def test_noise_that_is_assumed_changes_nothing_else() -> None:
    lorun, _ = converted()
    frozen = [parameter for name, parameter in lorun.named_parameters() if "lora_A" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    with lorun.assume_noise(25):
        assert lorun.adapter_info["default"].sigma == 25
    assert lorun.adapter_info["default"].sigma is None and not any(p.requires_grad for p in frozen)
    with lorun.assume_noise(25):
        lorun.set_noise("default", sigma=40)
    assert lorun.adapter_info["default"].sigma == 40
    lorun.set_noise("default")
    lorun.copy_adapter("default", "other")
    with lorun.assume_noise(25):
        lorun.set_adapter("other")
        lorun.delete_adapter("default")
    assert lorun.adapter_names == ["other"] and lorun.adapter_info["other"].sigma is None


def test_an_interpolation_follows_buffers_and_is_made_anew_after_training() -> None:
    net = ListOfBlocks([Block(nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1))) for _ in range(3)])
    lorun = lorun_adapt.convert(net.train(), rank=2)
    lorun.copy_adapter("default", "noisy")
    lorun.set_noise("default", sigma=10)
    lorun.set_noise("noisy", sigma=50)
    lorun.eval().select_adapter(30)
    first = lorun(*BATCH)
    lorun.train().set_adapter("noisy")
    for _ in range(2):  # one set has seen more batches than the other
        lorun(*BATCH)
    lorun.eval().select_adapter(30)
    second = lorun(*BATCH)
    assert not torch.equal(first, second)
    with torch.no_grad():
        for parameter in lorun.adapters[INTERPOLATED].parameters():
            parameter.mul_(2)
    lorun.set_adapter("default")
    assert lorun.select_adapter(30) == INTERPOLATED and torch.equal(lorun(*BATCH), second)


@pytest.mark.parametrize("sigma", [float("nan"), -5, True, "auto"])
def test_weights_for_what_is_no_noise_level(sigma: object) -> None:
    with pytest.raises(LoRunError, match="expected a sigma of 0 or more"):
        levels(10, 50).weights_for(sigma)


def test_noise_that_a_task_estimates() -> None:
    lorun = levels(10, 50)
    for arguments in ((), BATCH):
        with pytest.raises(LoRunError, match=r"noise_level\(args\) of a task: set lorun.task"):
            lorun.select_adapter("auto", *arguments)
    lorun.task = SimpleNamespace(noise_level=lambda args: 50 * float(args[0].max() > 1))
    with pytest.raises(LoRunError, match="the arguments of a forward"):
        lorun.select_adapter("auto")
    assert lorun.select_adapter("auto", torch.full((1,), 2.0)) == "sigma50"
    lorun.task = SimpleNamespace(noise_level=lambda args: float("nan"))
    with pytest.raises(LoRunError, match="a sigma of 0 or more, found nan"):
        lorun.select_adapter("auto", *BATCH)
    assert lorun.active_adapters == ["sigma50"]
    assert copy.deepcopy(lorun).task is lorun.task


@pytest.mark.parametrize(("sigma", "arguments"), [(-1, ()), ("x", ()), (None, ()), (25, (1,))])
def test_what_is_no_noise_level(sigma, arguments) -> None:
    with pytest.raises(LoRunError, match="expected a sigma|takes no further arguments, only 'auto' does"):
        levels(10).select_adapter(sigma, *arguments)


def test_no_set_says_what_it_is_for() -> None:
    lorun, _ = converted()
    lorun.set_noise("default", noise_schedule=[1, 2, 3])
    with pytest.raises(LoRunError, match="has a known sigma"):
        lorun.select_adapter(25)
    assert lorun.adapter_names == ["default"]


def test_a_set_begins_between_those_for_other_noise() -> None:
    lorun = levels(10, 50, 100)
    lorun.add_weighted_adapter(["sigma10", "sigma50"], [0.25, 0.75], "expected")
    expected = {name: tensor.clone() for name, tensor in lorun.adapters["expected"].state_dict().items()}
    nothing = {"steps": 1, "loss": lambda output, batch: 0 * output.sum()}
    lorun.finetune(noisy(), "new", ["sigma10", "sigma50", "sigma100"], sigma=40, **nothing)
    assert same(lorun.adapters["new"].state_dict(), expected) and lorun.adapter_info["new"] == AdapterInfo(40.0)
    lorun.finetune(noisy(), "there", ["sigma10", "sigma50"], sigma=50, **nothing)
    assert same(lorun.adapters["there"].state_dict(), lorun.adapters["sigma50"].state_dict())
    lorun.finetune(noisy(), "mean", ["sigma10", "default"], sigma=50, **nothing)
    lorun.add_weighted_adapter(["sigma10", "default"], [0.5, 0.5], "halves")
    assert same(lorun.adapters["mean"].state_dict(), lorun.adapters["halves"].state_dict())


def test_noise_that_a_task_refuses_is_not_assumed() -> None:
    class Refusing:
        def schedule(self, net: nn.Module, sigmas: Sequence[float]) -> None:
            raise ValueError("no such noise")

    lorun = lorun_adapt.convert(ToyUnfoldingNet(), rank=1)
    lorun.copy_adapter("default", "other")
    lorun.set_adapter({0: "other"})
    lorun.task = Refusing()
    with pytest.raises(ValueError, match="no such noise"), lorun.assume_noise(25):
        pass
    assert [info.sigma for info in lorun.adapter_info.values()] == [None, None]


def test_a_schedule_that_is_set_in_inference_mode_trains() -> None:
    class Steps:
        def schedule(self, net: nn.Module, sigmas: Sequence[float]) -> None:
            for stage, sigma in zip(net.stages, sigmas):
                stage.step.data.fill_(0.5 + sigma / 1000)

    net, batches = ToyUnfoldingNet(), [torch.rand(2, 1, 8, 8)]
    lorun = lorun_adapt.convert(net, rank=1)
    lorun.set_noise("default", sigma=10)
    with torch.inference_mode():
        lorun.task = Steps()
    assert lorun.recover(net, batches, steps=4)

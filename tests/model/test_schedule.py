"""The network is told the noise schedule of the set that runs, by the task."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from dun_zoo import Block, Denoiser, ListOfBlocks, Looped
from fine_tuning_runs import converted, levels, noisy, to_truth
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt.files.layout import INTERPOLATED

BATCH = noisy(1)[0][:2]


class Told(nn.Module):
    """Stages that take a sigma: the first from an attribute, the others from a buffer and a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.denoisers = nn.ModuleList(Denoiser() for _ in range(3))
        self.first = 0.0
        self.register_buffer("second", torch.zeros(()))
        self.third = nn.Parameter(torch.zeros(()))

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for sigma, denoiser in zip((self.first, self.second, self.third), self.denoisers):
            x = denoiser(x * mask + sigma)
        return x


def tell(net: Told, sigmas: list[float]) -> None:
    net.first = sigmas[0]
    net.second.fill_(sigmas[1])
    net.third.data = torch.tensor(float(sigmas[2]))


def told_network(*sigmas: float) -> Told:
    torch.manual_seed(0)
    net = Told().eval()
    if sigmas:
        with torch.no_grad():
            tell(net, list(sigmas))
    return net


def test_the_network_is_handed_the_schedule() -> None:
    lorun = lorun_adapt.convert(told_network(), rank=10_000)
    bare = lorun(*BATCH)
    lorun.task = SimpleNamespace(schedule=tell)
    assert torch.equal(lorun(*BATCH), bare)  # no set says what it is for
    lorun.copy_adapter("default", "one")
    lorun.set_noise("one", sigma=2)
    lorun.copy_adapter("default", "each")
    lorun.set_noise("each", noise_schedule=[1, 2, 3])

    def close(choice, *sigmas: float) -> None:
        lorun.set_adapter(choice)
        torch.testing.assert_close(lorun(*BATCH), told_network(*sigmas)(*BATCH), rtol=1e-4, atol=1e-4)

    close("each", 1, 2, 3)
    close("one", 2, 2, 2)
    close({0: "each"}, 1, 2, 2)
    close("default", 0, 0, 0)  # nothing of it is left
    with lorun.disable_adapter():
        assert lorun.network.second == 0
    lorun.set_adapter("each")
    torch.testing.assert_close(lorun.merge_and_unload()(*BATCH), lorun(*BATCH), rtol=1e-4, atol=1e-4)
    twice = copy.deepcopy(lorun).double()
    torch.testing.assert_close(twice(*(v.double() for v in BATCH)).float(), lorun(*BATCH), rtol=1e-4, atol=1e-4)
    lorun.set_noise("each", noise_schedule=[3, 2, 1])
    close("each", 3, 2, 1)
    assert lorun.base.third == 0 and lorun.base.second == 0
    lorun.task = None
    assert torch.equal(lorun(*BATCH), bare)


class Adjusted(Denoiser):
    """Takes a sigma from an attribute and a gain from a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.sigma = 0.0
        self.register_buffer("gain", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * super().forward(x + self.sigma)


def tell_in_place(net: nn.Module, sigmas: list[float]) -> None:
    denoiser = net.p if hasattr(net, "p") else net.blocks[0].denoiser
    denoiser.sigma = sigmas[0]
    denoiser.gain.fill_(1 + sigmas[0])


def tell_anew(net: nn.Module, sigmas: list[float]) -> None:
    denoiser = net.p if hasattr(net, "p") else net.blocks[0].denoiser
    denoiser.sigma, denoiser.gain = torch.tensor(sigmas[0]), torch.tensor(1 + sigmas[0])


@pytest.mark.parametrize("schedule", [tell_in_place, tell_anew])
@pytest.mark.parametrize("kind", ["looped", "many_parents"])
def test_a_module_that_serves_all_stages_is_handed_the_schedule(kind: str, schedule) -> None:
    torch.manual_seed(0)
    denoiser = Adjusted()
    net = (Looped() if kind == "looped" else ListOfBlocks([Block(denoiser) for _ in range(3)])).eval()
    if kind == "looped":
        net.p = denoiser
    lorun = lorun_adapt.convert(net, rank=10_000, **({"example_inputs": BATCH} if kind == "looped" else {}))
    lorun.task = SimpleNamespace(schedule=schedule)
    bare = lorun(*BATCH)
    torch.testing.assert_close(bare, net(*BATCH), rtol=1e-4, atol=1e-4)
    lorun.set_noise("default", sigma=0.5)
    with torch.no_grad():
        schedule(net, [0.5])
    assert not torch.allclose(lorun(*BATCH), bare)
    torch.testing.assert_close(lorun(*BATCH), net(*BATCH), rtol=1e-4, atol=1e-4)
    lorun.set_noise("default")
    assert torch.equal(lorun(*BATCH), bare)


def test_a_schedule_that_fails_leaves_what_was() -> None:
    lorun, _ = converted()
    lorun.copy_adapter("default", "a")
    lorun.set_noise("a", sigma=25)
    parameters = [id(parameter) for parameter in lorun.adapters.parameters()]
    calls: list[list[float]] = []

    def schedule(net: nn.Module, sigmas: list[float]) -> None:
        calls.append(sigmas)
        if sigmas[0] > 25 or len(calls) > 7:
            raise RuntimeError("too noisy")

    lorun.task = SimpleNamespace(schedule=schedule)
    lorun.set_adapter("a")
    network = lorun.network
    with pytest.raises(RuntimeError, match="too noisy"):
        lorun.set_noise("a", sigma=26)
    assert lorun.adapter_info["a"].sigma == 25
    lorun(*BATCH)
    with pytest.raises(RuntimeError, match="too noisy"):
        lorun.finetune(noisy(), "new", sigma=50, steps=3, loss=to_truth)
    assert lorun.adapter_names == ["default", "a"] and lorun.active_adapters == ["a"]
    with pytest.raises(TypeError):
        lorun.task = SimpleNamespace(schedule=lambda: None)
    assert lorun.task.schedule is schedule and type(lorun.network) is type(network)
    lorun(*BATCH)
    lorun.set_noise("a", sigma=24)
    count = len(calls)
    lorun.set_noise("a", sigma=23)
    assert len(calls) == count + 1 and calls[-1] == [23.0] * 3
    calls.extend([[]] * 8)  # from now on it always raises
    with pytest.raises(RuntimeError, match="too noisy"):
        lorun.set_noise("a", sigma=22)
    lorun(*BATCH)
    assert lorun.adapter_info["a"].sigma == 23
    assert [id(parameter) for parameter in lorun.adapters.parameters()] == parameters


def test_an_interpolation_that_fails_leaves_no_set() -> None:
    lorun = levels(10, 50)
    before = lorun.active_adapters

    def schedule(net: nn.Module, sigmas: list[float]) -> None:
        if sigmas[0] == 30:
            raise RuntimeError("not this one")

    lorun.task = SimpleNamespace(schedule=schedule)
    with pytest.raises(RuntimeError, match="not this one"):
        lorun.select_adapter(30)
    assert lorun.adapter_names == ["default", "sigma10", "sigma50"] and lorun.active_adapters == before
    assert lorun.select_adapter(20) == INTERPOLATED
    with pytest.raises(RuntimeError, match="not this one"):
        lorun.select_adapter(30)
    assert lorun.adapter_info[INTERPOLATED].sigma == 20
    lorun(*BATCH)


def test_a_task_may_be_a_network() -> None:
    class Estimator(nn.Linear):
        def noise_level(self, args: tuple[Tensor, ...]) -> float:
            return 50.0

    lorun = levels(10, 50)
    lorun.task = Estimator(3, 3)
    assert lorun.select_adapter("auto", *BATCH) == "sigma50"
    assert not any("task" in name for name, _ in lorun.named_parameters())

"""What a set holds for parameters outside the stages."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from dun_zoo import Denoiser, ListOfDenoisers, Looped, gradient_step
from fine_tuning_runs import frozen, noisy, same, to_truth
from hub_server import HubServer
from huggingface_hub import constants
from safetensors.torch import load_file
from tasks import call
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel

BATCH = noisy(1)[0][:2]


def beside() -> tuple[LoRunModel, nn.Module]:
    """Step sizes and a condition network stand beside the stages."""
    torch.manual_seed(0)
    net = ListOfDenoisers([Denoiser() for _ in range(3)]).eval()
    return lorun_adapt.convert(net, rank=2), net


def test_any_training_loop_trains_them() -> None:
    lorun, net = beside()
    expected = lorun(*BATCH)
    parameters = {name: p for name, p in lorun.named_parameters() if p.requires_grad}
    lorun.add_outside("default", "step*")
    assert torch.equal(lorun(*BATCH), expected)
    more = {name: p for name, p in lorun.named_parameters() if p.requires_grad and name not in parameters}
    assert [tuple(p.shape) for p in more.values()] == [tuple(net.steps.shape)]
    optimizer = torch.optim.SGD([p for p in lorun.parameters() if p.requires_grad], lr=0.1)
    lorun(*BATCH).square().sum().backward()
    optimizer.step()
    trained = lorun.outside_of("default")["steps"].clone()
    assert not torch.equal(trained, net.steps) and torch.equal(lorun.base.steps, net.steps)
    lorun.add_outside("default", ["steps", "condition.0.*"])  # what it has already stays
    assert torch.equal(lorun.outside_of("default")["steps"], trained) and len(lorun.outside_of("default")) == 3
    again, _ = beside()
    again.add_outside("default", ["steps", "condition.0.*"])
    again.load_state_dict(lorun.state_dict())
    assert torch.equal(again(*BATCH), lorun(*BATCH))
    lorun.copy_adapter("default", "other")  # not active, so not trained
    lorun.add_outside("other", "condition.2.*")
    assert not any(p.requires_grad for p in lorun.outside_of("other").values())
    before = lorun.outside_of("default")
    for wrong in (("nobody", "steps"), ("default", "blocks.*")):
        with pytest.raises(LoRunError, match="no adapter set 'nobody'|no parameter outside the stages matches"):
            lorun.add_outside(*wrong)
    assert lorun.outside_of("default").keys() == before.keys()


def test_what_belongs_to_the_noise_trains_and_travels(tmp_path) -> None:
    lorun, net = beside()
    before, base = frozen(lorun), lorun(*BATCH)
    lorun.finetune(noisy(), "new", also=["steps", "condition.*"], steps=30, loss=to_truth)
    assert same(frozen(lorun), before)
    own = lorun.outside_of("new")
    assert set(own) == {"steps", "condition.0.weight", "condition.0.bias", "condition.2.weight", "condition.2.bias"}
    assert not torch.equal(own["steps"], net.steps) and lorun.network.steps is own["steps"]
    assert not torch.equal(own["condition.0.weight"], net.condition[0].weight)
    expected = lorun(*BATCH)
    lorun.save_pretrained(tmp_path / "saved")
    loaded = lorun_adapt.from_pretrained(tmp_path / "saved", net)
    assert torch.equal(loaded(*BATCH), expected)
    assert torch.equal(lorun.merge_and_unload()(*BATCH), expected)
    assert torch.equal(copy.deepcopy(lorun)(*BATCH), expected)
    assert (
        loaded.num_parameters()
        == lorun.num_parameters()
        == beside()[0].num_parameters()
        + sum(p.numel() for part in (lorun.adapters["new"], lorun.outside) for p in part.parameters())
    )
    lorun.set_adapter("default")
    assert torch.equal(lorun(*BATCH), base)
    assert not any(p.requires_grad for p in lorun.outside.parameters())

    other, _ = beside()
    other.load_adapter(tmp_path / "saved/adapters/new", "theirs")
    other.set_adapter("theirs")
    assert torch.equal(other(*BATCH), expected)
    other.load_state_dict({n.replace(".new.", ".theirs."): t for n, t in loaded.state_dict().items()})
    assert torch.equal(other(*BATCH), expected)
    assert torch.equal(other.double().float()(*BATCH), expected)
    other.delete_adapter("default")
    assert not other.state_dict().keys() & {"outside.default.steps"}


def test_it_comes_from_the_hub_without_the_base(hub: HubServer, capsys, monkeypatch) -> None:
    lorun, net = beside()
    lorun.finetune(noisy(), "new", sigma=25, also="steps", steps=3, loss=to_truth)
    expected = lorun(*BATCH)
    lorun.push_to_hub("alice/net", token="alice-token")
    hub.forget()
    other = lorun_adapt.from_pretrained("alice/net", net)
    other.delete_adapter("default")
    assert torch.equal(other(*BATCH), expected)
    hub.forget()
    other.load_adapter("alice/net", "again", subfolder="adapters/new")
    assert not hub.downloads  # all is in the cache
    fresh, _ = beside()
    shutil.rmtree(constants.HF_HUB_CACHE)
    fresh.load_adapter("alice/net", "theirs", stage=1, subfolder="adapters/new")
    assert {name.rpartition("/")[2] for name in hub.downloads} == {
        "lorun_config.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    fresh.load_adapter("alice/net", "new")
    fresh.set_adapter("new")
    assert torch.equal(fresh(*BATCH), expected) and fresh.adapter_info["new"].sigma == 25
    names = {name.rpartition("/")[2] for name in hub.downloads}
    assert names >= {"outside.safetensors", "set_config.json"} and not names & {"base.safetensors", "README.md"}
    code, out, _ = call(capsys, monkeypatch, "list", "alice/net")
    assert code == 0 and [line.split()[:3] for line in out.splitlines() if "new" in line] == [["new", "25", "3"]]


def test_a_mix_of_sets_leaves_the_outside_as_it_was() -> None:
    lorun, net = beside()
    lorun.finetune(noisy(), "new", also="steps", steps=3, loss=to_truth)
    lorun.set_adapter({0: "default"})
    assert torch.equal(lorun.network.steps, net.steps)
    lorun.set_adapter("new")
    assert lorun.network.steps is lorun.outside_of("new")["steps"]
    lorun.add_weighted_adapter(["default", "new"], [0.5, 0.5], "halves")
    torch.testing.assert_close(lorun.outside_of("halves")["steps"], (net.steps + lorun.network.steps).detach() / 2)
    lorun.copy_adapter("new", "twin")
    assert torch.equal(lorun.outside_of("twin")["steps"], lorun.outside_of("new")["steps"])
    assert lorun.outside_of("twin")["steps"] is not lorun.outside_of("new")["steps"]
    lorun.finetune(noisy(), "more", "new", steps=3, loss=to_truth)
    assert not torch.equal(lorun.outside_of("more")["steps"], lorun.outside_of("new")["steps"])


def test_patterns_that_match_nothing_outside() -> None:
    lorun, _ = beside()
    for pattern in ("nothing", "denoisers.*"):
        with pytest.raises(LoRunError, match="no parameter outside the stages matches"):
            lorun.finetune(noisy(), "new", also=["steps", pattern], steps=3, loss=to_truth)
    assert lorun.adapter_names == ["default"] and not len(lorun.outside)


@pytest.mark.parametrize("damage", ["shape", "name", "nan"])
def test_damage_outside_is_refused(tmp_path, damage: str) -> None:
    from safetensors.torch import save_file

    lorun, _ = beside()
    lorun.finetune(noisy(), "new", also="steps", steps=3, loss=to_truth)
    expected = lorun(*BATCH)
    lorun.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/adapters/new").rename(tmp_path / "new")
    file = tmp_path / "new/outside.safetensors"
    steps = load_file(file)["steps"]
    save_file(
        {"shape": {"steps": steps[:2]}, "name": {"denoisers.0.head.weight": steps}, "nan": {"steps": steps / 0 * 0}}[
            damage
        ],
        file,
    )
    with pytest.raises(LoRunError, match="outside.safetensors"):
        lorun.load_adapter(tmp_path / "new", "new")
    assert torch.equal(lorun(*BATCH), expected)


class LoopWithSteps(Looped):
    """The steps of a loop stand beside the module that it calls."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.Parameter(torch.full((4,), 0.5))

    def forward(self, y: Tensor, mask: Tensor) -> Tensor:
        x = y
        for step in self.steps:
            x = self.p(gradient_step(x, y, mask, step))
        return x


def test_in_a_loop_as_well() -> None:
    torch.manual_seed(0)
    lorun = lorun_adapt.convert(LoopWithSteps().eval(), rank=2, calls={"p": 4})
    before = frozen(lorun)
    lorun.finetune(noisy(), "new", also="steps", steps=10, loss=to_truth)
    assert same(frozen(lorun), before) and not torch.equal(lorun.outside_of("new")["steps"], lorun.base.steps)

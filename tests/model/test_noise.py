"""Sets for noise levels: what is known of them, what travels with them, and the choice of one."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dun_zoo import Block, Denoiser, ListOfBlocks, ListOfDenoisers, Looped, gradient_step
from fine_tuning_runs import converted, frozen, noisy, same, to_truth
from hub_server import HubServer
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file
from tasks import GREY_TASK, call, call_quietly
from torch import Tensor, nn

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel
from lorun_adapt.files.adapter_info import read_adapter_info
from lorun_adapt.files.description import as_text
from lorun_adapt.files.layout import INTERPOLATED
from lorun_adapt.network.converted import AdapterInfo, Quality
from lorun_adapt.network.noise import between, mixed
from lorun_adapt.task.task import load_task

BATCH = noisy(1)[0][:2]


def beside() -> tuple[LoRunModel, nn.Module]:
    """Step sizes and a condition network stand beside the stages."""
    torch.manual_seed(0)
    net = ListOfDenoisers([Denoiser() for _ in range(3)]).eval()
    return lorun_adapt.convert(net, rank=2), net


def levels(*sigmas: float) -> LoRunModel:
    """A set for each sigma, each a bit farther from the first."""
    lorun, _ = converted()
    for i, sigma in enumerate(sigmas):
        lorun.copy_adapter("default", f"sigma{sigma:g}")
        lorun.set_noise(f"sigma{sigma:g}", sigma=sigma)
        with torch.no_grad():
            for parameter in lorun.adapters[f"sigma{sigma:g}"].parameters():
                parameter.mul_(1 + i)
    return lorun


# --- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sigma", "expected"),
    [
        (10, {"a": 1}),
        (20, {"a": 0.75, "b": 0.25}),
        (49, {"a": 0.025, "b": 0.975}),
        (50, {"b": 1}),
        (60, {"b": 0.9, "c": 0.1}),
        (5, {"a": 1}),
        (500, {"c": 1}),
    ],
)
def test_between(sigma: float, expected: dict[str, float]) -> None:
    assert between(sigma, {"c": 150, "a": 10, "b": 50}) == pytest.approx(expected)


def test_what_a_sum_stands_for() -> None:
    assert mixed([10.0, 50.0], [0.25, 0.75]) == 40
    assert mixed([(0.0, 10.0), (10.0, 30.0)], [0.5, 0.5]) == (5, 20)
    for noises, weights in (
        ([10.0, None], [0.5, 0.5]),
        ([10.0, 50.0], [1, 1]),
        ([10.0, 50.0], [2, -1]),
        ([1.0, (1.0, 2.0)], [0.5, 0.5]),
    ):
        assert mixed(noises, weights) is None


# --- what is known of a set ----------------------------------------------------------------------


def test_it_is_saved_and_loaded(tmp_path) -> None:
    lorun, net = converted()
    assert lorun.finetune(noisy(), "sigma25", sigma=25, steps=3, loss=to_truth)
    lorun.finetune(noisy(), "stages", noise_schedule=[30, 20, 10.5], steps=3, loss=to_truth)
    measured = Quality("photographs", 8, 25.0, 30.5, 0.9)
    lorun.set_adapter("sigma25")
    lorun.note_quality(measured)
    lorun.save_pretrained(tmp_path / "saved")
    expected = {
        "default": AdapterInfo(),
        "sigma25": AdapterInfo(25.0, quality=(measured,)),
        "stages": AdapterInfo(noise_schedule=(30.0, 20.0, 10.5)),
    }
    assert lorun_adapt.from_pretrained(tmp_path / "saved", net).adapter_info == expected
    lorun.load_adapter(tmp_path / "saved/adapters/stages", "again")
    assert lorun.adapter_info["again"] == expected["stages"]
    (tmp_path / "saved/adapters/sigma25").rename(tmp_path / "alone")  # without the folder that knows of it
    lorun.load_adapter(tmp_path / "alone", "alone")
    assert lorun.adapter_info["alone"] == expected["sigma25"]
    assert not (tmp_path / "saved/adapters/default/set_config.json").exists()
    lorun.load_adapter(tmp_path / "alone/stage_00", "alone", stage=0)
    assert lorun.adapter_info["alone"] == AdapterInfo(25.0)  # what was measured was so of other weights


@pytest.mark.parametrize("noise", [np.float32(25), torch.tensor(25), 25, np.int64(25)])
def test_what_is_one_sigma(noise) -> None:
    lorun, _ = converted()
    lorun.set_noise("default", sigma=noise)
    assert lorun.adapter_info["default"] == AdapterInfo(sigma=25.0)
    lorun.set_noise("default", noise_schedule=torch.linspace(1, 3, 3))
    assert lorun.adapter_info["default"].noise_schedule == (1, 2, 3)


@pytest.mark.parametrize("noise", [-1, float("nan"), float("inf"), True, "25", [1, 2], [1, 2, 3, 4], [1, 2, -3], []])
def test_what_is_no_noise(noise) -> None:
    lorun, _ = converted()
    before = frozen(lorun)
    for given in ({"sigma": noise}, {"noise_schedule": noise}):
        with pytest.raises(LoRunError, match="one sigma of 0 or more for the measurements, or 3"):
            lorun.set_noise("default", **given)
        with pytest.raises(LoRunError, match="one sigma of 0 or more for the measurements, or 3"):
            lorun.finetune(noisy(), "new", **given, steps=3, loss=to_truth)
    for one, several in ((None, 25), ([1, 2, 3], None), (25, [1, 2, 3])):
        with pytest.raises(LoRunError, match="as the other|not both"):
            lorun.set_noise("default", sigma=one, noise_schedule=several)
        with pytest.raises(LoRunError, match="as the other|not both"):
            lorun.finetune(noisy(), "new", sigma=one, noise_schedule=several, steps=3, loss=to_truth)
    assert lorun.adapter_info == {"default": AdapterInfo()} and same(frozen(lorun), before)
    with pytest.raises(LoRunError, match="no adapter set 'other'"):
        lorun.set_noise("other", sigma=1)


GOOD = {"noise_schedule": 25.0, "measured": [vars(Quality("a", 1, 0.0, 1.0, 1.0))]}


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        {},
        {**GOOD, "more": 1},
        {**GOOD, "noise_schedule": "x"},
        {**GOOD, "noise_schedule": [1.0]},
        {**GOOD, "noise_schedule": -1},
        {**GOOD, "measured": {}},
        {**GOOD, "measured": [1]},
        {**GOOD, "measured": GOOD["measured"] * 101},
        {**GOOD, "measured": [{**GOOD["measured"][0], "images": "x" * 201}]},
        {**GOOD, "measured": [{**GOOD["measured"][0], "count": 0}]},
        {**GOOD, "measured": [{**GOOD["measured"][0], "psnr": None}]},
        {**GOOD, "measured": [dict(reversed(GOOD["measured"][0].items())) | {"psnr": None}]},
        {**GOOD, "measured": [{**GOOD["measured"][0], "psnr": "1"}]},
        {**GOOD, "measured": [{**GOOD["measured"][0], "psnr": 10**400}]},
        {**GOOD, "measured": [{**GOOD["measured"][0], "images": "\ud800"}]},
    ],
)
def test_damage_is_refused(wrong) -> None:
    assert read_adapter_info(json.dumps(GOOD).encode(), 3, "here").sigma == 25
    backwards = {**GOOD, "measured": [dict(reversed(GOOD["measured"][0].items()))]}
    assert read_adapter_info(json.dumps(backwards).encode(), 3, "here").quality == (Quality("a", 1, 0.0, 1.0, 1.0),)
    with pytest.raises(LoRunError, match="here has an invalid '"):
        read_adapter_info(json.dumps(wrong).encode(), 3, "here")


def test_a_measurement_takes_the_place_of_the_same() -> None:
    about = AdapterInfo()
    for psnr in (1.0, 2.0):
        for sigma in (0.0, 25.0):
            about = about.with_quality(Quality("a", 8, sigma, psnr, 1.0))
    assert [(m.sigma, m.psnr) for m in about.quality] == [(0, 2), (25, 2)]


def test_all_that_is_noted_can_be_read(tmp_path) -> None:
    lorun, net = converted()
    lorun.set_noise("default", noise_schedule=[1 / 3] * 3)
    for i in range(120):
        lorun.note_quality(Quality(200 * "é", 8, i / 7, 1 / 3, 1 / 3, 1 / 3, 1 / 3))
    for psnr in (float("inf"), float("nan")):
        with pytest.raises(LoRunError, match="finite figures"):
            lorun.note_quality(Quality("a", 8, 0.0, psnr, 1.0))
    lorun.save_pretrained(tmp_path / "saved")
    assert len(lorun_adapt.from_pretrained(tmp_path / "saved", net).adapter_info["default"].quality) == 100
    lorun.card = lorun_adapt.Card(license="a\nb")
    with pytest.raises(LoRunError, match="short lines of printable text"):
        lorun.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_quality_is_that_of_the_weights() -> None:
    lorun, net = converted()
    lorun.note_quality(Quality("a", 8, 0.0, 30.0, 1.0))
    lorun.recover(net, [batch[:2] for batch in noisy(4)], steps=1)
    assert lorun.adapter_info["default"].quality == ()


def test_names_of_files_stay_inside(made, capsys, monkeypatch) -> None:
    description = json.loads((made / "net/lorun_config.json").read_text())
    description.pop("sha256")
    description["files"]["../outside/x"] = "0" * 64
    (made / "net/lorun_config.json").write_text(as_text(description))
    code, _, err = call(
        capsys, monkeypatch, "eval", made / "my_task.py", "--converted", made / "net", "--images", made / "images",
        "--record",
    )  # fmt: skip
    assert code == 2 and "invalid 'files'" in err and not (made / "outside").exists()


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


def test_noise_that_a_task_estimates() -> None:
    lorun = levels(10, 50)
    for arguments in ((), BATCH):
        with pytest.raises(LoRunError, match="a task with noise_level"):
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
    with pytest.raises(LoRunError, match="expected a sigma|are for 'auto' only"):
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


# --- what stands outside the stages --------------------------------------------------------------


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
    from safetensors.torch import load_file, save_file

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


# --- the task's schedule -------------------------------------------------------------------------


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


# --- the command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, eight images, and a conversion."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "my_task.py").write_text(GREY_TASK)
    task = load_task(str(folder / "my_task.py"))
    torch.save(task.build().state_dict(), folder / "net.pth")
    (folder / "images").mkdir()
    smooth = np.linspace(0, 200, 40)[:, None] + np.linspace(0, 50, 40)
    for i in range(8):
        Image.fromarray(np.roll(smooth, 5 * i, 0).astype(np.uint8)).save(folder / f"images/{i}.png")
    call_quietly(
        "convert", folder / "my_task.py", "--weights", folder / "net.pth", "--rank", 2,
        "--calibration", folder / "images", "--steps", 20, "--sigma", 0, "--out", folder / "net",
    )  # fmt: skip
    return folder


@pytest.fixture
def made(made_once: Path, tmp_path: Path) -> Path:
    """A copy of the same, to change."""
    return Path(shutil.copytree(made_once, tmp_path, dirs_exist_ok=True))


def finetune(made: Path, capsys, monkeypatch, *options: object) -> tuple[int, str, str]:
    arguments = ["--converted", made / "net", "--sigma", 25, "--adapter-name", "sigma25", "--images", made / "images"]
    return call(capsys, monkeypatch, "finetune", made / "my_task.py", *arguments, "--out", made / "out", *options)


def test_finetune_on_the_command_line(made, capsys, monkeypatch) -> None:
    """From eight images."""
    code, out, err = finetune(made, capsys, monkeypatch, "--steps", 150)
    assert code == 0, err
    scores = {line.split()[0]: float(line.split()[1]) for line in out.splitlines() if len(line.split()) == 3}
    assert scores["sigma25"] > scores["default"] + 0.3
    task = load_task(str(made / "my_task.py"))
    lorun = lorun_adapt.from_pretrained(made / "out", task.build())
    assert lorun.adapter_names == ["default", "sigma25"] and lorun.adapter_info["default"].sigma == 0
    about = lorun.adapter_info["sigma25"]
    assert about.sigma == 25 and about.quality[0].count == 1 and about.quality[0].images == "images, held out"
    before = lorun_adapt.from_pretrained(made / "net", task.build())
    for name, tensor in before.state_dict().items():
        assert torch.equal(lorun.state_dict()[name], tensor)
    assert lorun.active_adapters == ["default"]
    lorun.task = task
    assert lorun.network.sigmas == [0.0] * 3
    lorun.set_adapter("sigma25")
    assert lorun.network.sigmas == [25.0] * 3
    assert lorun.select_adapter("auto", torch.zeros(3, 3)) == "default"
    with pytest.warns(UserWarning, match="nearest"):
        assert lorun.select_adapter("auto", 200 * torch.randn(3, 3)) == "sigma25"
    assert lorun.select_adapter(12.5) == INTERPOLATED

    code, out, err = call(
        capsys, monkeypatch, "eval", made / "my_task.py", "--converted", made / "out", "--images", made / "images",
        "--adapter-name", "default", "--sigma", 25, "--record", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["parameters_converted"] == before.num_parameters()  # with the set that ran
    again = lorun_adapt.from_pretrained(made / "out", task.build())
    assert again.adapter_info["default"].quality[0].psnr == json.loads(out)["mean"]["psnr_converted"]
    assert again.active_adapters == lorun_adapt.from_pretrained(made / "out", task.build()).active_adapters
    assert again.adapter_names == ["default", "sigma25"] and again.adapter_info["sigma25"] == about


TOLD = """
class Net(ListOfBlocks):
    sigma = 0.0

    def forward(self, y, mask):
        return super().forward(y + self.sigma / 255, mask)

def build():
    torch.manual_seed(0)
    return Net([Block(Denoiser()) for _ in range(3)])

def schedule(net, sigmas):
    net.sigma = sigmas[0]
"""


def test_original_and_conversion_are_told_the_same(made, capsys, monkeypatch) -> None:
    file = made / "told.py"
    file.write_text(GREY_TASK + TOLD)
    task = load_task(str(file))
    given = (file, "--weights", made / "net.pth")
    images = ("--images", made / "images", "--json")

    def scores(folder: Path, *options: object) -> tuple[float, float]:
        code, out, err = call(capsys, monkeypatch, "eval", *given, "--converted", folder, *images, *options)
        assert code == 0, err
        mean = json.loads(out)["mean"]
        return mean["psnr"], mean["psnr_converted"]

    code, _, err = call(capsys, monkeypatch, "convert", *given, "--rank", 100, "--out", made / "exact")
    assert code == 0, err
    for sigma in (0, 25):
        original, exact = scores(made / "exact", "--sigma", sigma, "--record")
        assert original == pytest.approx(exact, abs=1e-3)
    about = lorun_adapt.from_pretrained(made / "exact", task.build()).adapter_info["default"]
    assert about.noise_schedule is None and {found.sigma for found in about.quality} == {0, 25}
    training = ("--calibration", made / "images", "--steps", 10)
    code, _, err = call(
        capsys, monkeypatch, "convert", *given, "--rank", 100, *training, "--sigma", 25, "--out", made / "25"
    )
    assert code == 0, err
    code, _, err = call(
        capsys, monkeypatch, "recover", *given, "--converted", made / "25", *training, "--out", made / "again"
    )
    assert code == 0, err
    assert lorun_adapt.from_pretrained(made / "again", task.build()).adapter_info["default"].sigma == 25
    original, again = scores(made / "again", "--sigma", 25)
    assert original == pytest.approx(again, abs=0.1)


def test_where_to_save_is_looked_at_before_the_work(made, capsys, monkeypatch) -> None:
    (made / "results").mkdir()
    (made / "results/thesis.tex").write_text("years of work")
    monkeypatch.setattr("lorun_adapt.training.trainer.Trainer.train", lambda *_: pytest.fail("it trains"))
    for out in (made / "results", made / "my_task.py"):
        code, _, err = finetune(made, capsys, monkeypatch, "--steps", 3, "--out", out)
        assert code == 2 and "expected a" in err and "choose another" in err


def test_what_was_judged_is_shown_even_where_it_cannot_be_noted(made, capsys, monkeypatch) -> None:
    lorun = lorun_adapt.from_pretrained(made / "net", load_task(str(made / "my_task.py")).build())
    lorun.copy_adapter("default", "other")
    lorun.set_adapter({0: "other"})
    lorun.save_pretrained(made / "net")
    code, out, err = call(
        capsys, monkeypatch, "eval", made / "my_task.py", "--converted", made / "net", "--images", made / "images",
        "--record",
    )  # fmt: skip
    assert code == 2 and "mean" in out and "error: stages run with different sets" in err


def test_a_licence_that_no_card_can_hold(made, capsys, monkeypatch) -> None:
    file = made / "my_task.py"
    file.write_text(file.read_text() + "\nlicense = 'mit\\nmore'\n")
    code, _, err = finetune(made, capsys, monkeypatch, "--steps", 3)
    assert code == 2 and "expected license in" in err


def test_a_folder_keeps_its_dtype(made, capsys, monkeypatch) -> None:
    before = lorun_adapt.from_pretrained(made / "net", load_task(str(made / "my_task.py")).build())
    for dtype in (torch.float32, torch.float16):
        before.save_pretrained(made / "net", dtype=dtype)
        assert finetune(made, capsys, monkeypatch, "--steps", 3)[0] == 0
        assert stored(made / "out") == {dtype} and stored(made / "out/adapters/sigma25") == {dtype}
        for file in (made / "net").rglob("*.safetensors"):
            assert same(load_file(file), load_file(made / "out" / file.relative_to(made / "net")))
    assert finetune(made, capsys, monkeypatch, "--steps", 3, "--dtype", "float32")[0] == 0
    assert stored(made / "out") == {torch.float32}
    given = (made / "my_task.py", "--weights", made / "net.pth", "--converted", made / "net")
    given = (*given, "--calibration", made / "images", "--steps", 3, "--out", made / "again")
    assert call(capsys, monkeypatch, "recover", *given)[0] == 0 and stored(made / "again") == {torch.float16}


def stored(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()}


def test_cards(made, capsys, monkeypatch) -> None:
    from huggingface_hub import ModelCard

    assert finetune(made, capsys, monkeypatch, "--steps", 3)[0] == 0
    card = ModelCard.load(made / "out/README.md")
    assert (card.data.library_name, card.data.license, card.data.base_model) == ("lorun-adapt", "mit", "alice/original")
    assert card.data.eval_results[0].metric_type == "psnr" and "lora" in card.data.tags
    for words in ("Grey images behind a mask.", "| `sigma25` | 25 | 3 |", "from_pretrained", "images, held out"):
        assert words in card.text
    own = ModelCard.load(made / "out/adapters/sigma25/README.md")
    assert own.data.license == "mit" and "# sigma25: adapters for ListOfBlocks" in own.text
    first = ModelCard.load(made / "out/adapters/default/README.md")
    assert first.data.eval_results is None and "255: 0." in first.text
    lorun = lorun_adapt.from_pretrained(made / "out", load_task(str(made / "my_task.py")).build())
    lorun.save_pretrained(made / "alone", adapters_only=True)
    text = (made / "alone/README.md").read_text()
    assert "The base is elsewhere" in text and "load_adapter" in text


def test_images_that_cannot_be_judged_do_not_cost_the_training(made, capsys, monkeypatch) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(made / "images/0.png")  # the one that is held out
    code, _, err = finetune(made, capsys, monkeypatch, "--steps", 3)
    assert code == 2 and "11 pixels a side" in err
    assert "sigma25" in lorun_adapt.from_pretrained(made / "out", load_task(str(made / "my_task.py")).build()).adapters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 3, "--start-from", "default", "--start-from", "default"), "from once"),
        (("--steps", 3, "--adapter-name", "default"), "a set 'default' already"),
        (("--steps", 3, "--start-from", "nothing"), "no adapter set 'nothing'"),
        (("--steps", 3, "--also", "steps"), "outside the stages"),
        (("--steps", 3, "--minutes", 1), "both minutes and steps"),
        ((), "neither minutes nor steps"),
    ],
)
def test_mistakes_on_the_command_line(made, capsys, monkeypatch, options, message: str) -> None:
    code, _, err = finetune(made, capsys, monkeypatch, *options)
    assert code == 2 and message in err and not (made / "out").exists()


def test_one_image_is_too_few(made, capsys, monkeypatch) -> None:
    for i in range(1, 8):
        (made / f"images/{i}.png").unlink()
    code, _, err = finetune(made, capsys, monkeypatch, "--steps", 3)
    assert code == 2 and "2 or more images" in err

"""Adapters on the untouched original: each stage keeps its own weights."""

from __future__ import annotations

import copy
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from conversions import SET, all_tensors, floats_of, relative, train_a_bit
from dun_zoo import Case, Denoiser, ListOfDenoisers
from peft import LoraConfig, PeftModel
from recovery_runs import measurements, teacher
from torch import nn

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.files.layout import CONFIG_FILE
from lorun_adapt.network.adapter import terms_of
from lorun_adapt.stages.stage_map import TensorSpec
from lorun_adapt.terms.lowrank import LowRank
from lorun_adapt.terms.term import Setting
from lorun_adapt.util.fingerprint import fingerprint_of


def unshared(case: Case) -> lorun_adapt.LoRunModel:
    config = LoraConfig(r=2, lora_alpha=4, target_parameters=all_tensors(case.net, **case.find()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "rank 2 is above the limit|the rank-2 term of .* is larger than the tensor")
        return lorun_adapt.convert(case.net, config, share=False, **case.find())


def same(output: torch.Tensor, expected: torch.Tensor, case: Case) -> bool:
    """Equal bit for bit; nearly so where torch computes attention otherwise because an adapter is there."""
    attends = any(isinstance(module, torch.nn.MultiheadAttention) for module in case.net.modules())
    return relative(output, expected) < 1e-6 if attends else torch.equal(output, expected)


@torch.no_grad()
def test_nothing_is_lost_and_nothing_shared(case: Case) -> None:
    lorun, before = unshared(case), fingerprint_of(case.net.state_dict())
    # Frozen as the base is: torch multiplies a 3-D input by a weight that trains with another kernel.
    expected = copy.deepcopy(case.net).requires_grad_(False)(*case.inputs)
    assert same(lorun(*case.inputs), expected, case)
    with lorun.disable_adapter():
        assert same(lorun(*case.inputs), expected, case)
    with torch.enable_grad():
        train_a_bit(lorun, case.inputs)
    trained = lorun(*case.inputs)
    assert relative(trained, expected) > 1e-4 and fingerprint_of(case.net.state_dict()) == before
    with lorun.disable_adapter():
        assert same(lorun(*case.inputs), expected, case)
    lorun.add_adapter("new", LoraConfig(r=1))
    lorun.set_adapter("new")
    assert same(lorun(*case.inputs), expected, case)
    lorun.set_adapter("default")
    for tensor in floats_of(case.net):
        tensor.add_(1)
    assert same(lorun(*case.inputs), trained, case)


@torch.no_grad()
def test_sets_travel_without_the_network(case: Case, tmp_path: Path) -> None:
    lorun = unshared(case)
    with torch.enable_grad():
        train_a_bit(lorun, case.inputs)
    expected = lorun(*case.inputs)
    lorun.save_pretrained(tmp_path / "whole")
    fresh = copy.deepcopy(case.net)
    for parameter in fresh.parameters():
        torch.nn.init.normal_(parameter)
    loaded = lorun_adapt.from_pretrained(tmp_path / "whole", fresh)
    assert torch.equal(loaded(*case.inputs), expected) and not loaded.stage_map.shared
    lorun.save_pretrained(tmp_path / "sets", adapters_only=True)
    again = unshared(case)
    again.load_adapter(tmp_path / "sets", "default")
    assert torch.equal(again(*case.inputs), expected)
    again.load_adapter(tmp_path / "whole" / SET, "other")
    again.add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")
    again.set_adapter("mean")
    assert relative(again(*case.inputs), expected) < 1e-5
    of_stages = [p for site in lorun.stage_map.sites for p in case.net.get_submodule(site.module).parameters()]
    if len(set(of_stages)) < len(of_stages):
        with pytest.raises(LoRunError, match="has one module for several stages, which differ after training"):
            lorun.merge_and_unload()
        return
    fresh.load_state_dict(lorun.merge_and_unload().state_dict(), strict=True)
    assert relative(fresh(*case.inputs), expected) < 1e-5


def a_network() -> ListOfDenoisers:
    torch.manual_seed(0)
    return ListOfDenoisers([Denoiser() for _ in range(3)])


INPUTS = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1, 8, 8)


def test_a_set_is_small_and_fine_tunes() -> None:
    net = a_network()
    lorun = lorun_adapt.convert(net, rank=1, share=False)
    report = lorun.report()
    inside = sum(p.numel() for p in net.denoisers.parameters())
    assert report.base.num_parameters == report.denoisers_before.num_parameters == inside
    assert report.network_before.num_parameters == sum(p.numel() for p in net.parameters())
    of_set = sum(p.numel() for p in lorun.adapters["default"].parameters())
    assert report.network_after.num_parameters == report.network_before.num_parameters + of_set
    assert of_set < inside / 2 and report.relative_error == 0 and "base of all stages" in str(report)
    before = fingerprint_of(lorun.base.state_dict())

    noisy = (INPUTS[0] + 0.2 * torch.randn(2, 1, 8, 8), INPUTS[1], INPUTS[0])

    def loss(output: torch.Tensor, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return (output - batch[2]).square().mean()

    assert lorun.finetune([noisy] * 4, "noisy", sigma=51, steps=200, loss=loss)
    assert loss(lorun(*noisy[:2]), noisy) < 0.95 * loss(net(*noisy[:2]), noisy)
    assert fingerprint_of(lorun.base.state_dict()) == before
    lorun.set_adapter("default")
    assert torch.equal(lorun(*INPUTS), net(*INPUTS))


def test_the_same_each_time() -> None:
    net = a_network()
    first, second = (lorun_adapt.convert(net, rank=2, share=False) for _ in range(2))
    assert fingerprint_of(first.state_dict()) == fingerprint_of(second.state_dict())


def test_there_is_nothing_to_recover() -> None:
    net = a_network()
    for wrong in ({"budget": 0.5}, {"energy": 0.5}, {"calibration": [INPUTS], "steps": 1}):
        with pytest.raises(LoRunError, match="share=False keeps every stage's weights"):
            lorun_adapt.convert(net, share=False, **wrong)
    with pytest.raises(LoRunError, match="nothing to recover: train a set with finetune"):
        lorun_adapt.convert(net, rank=1, share=False).recover(net, [INPUTS], steps=1)


def test_files_and_cards_say_which_of_the_two_it_is(tmp_path: Path) -> None:
    net = a_network()
    lorun = lorun_adapt.convert(net, share=False, rank=1)
    lorun.save_pretrained(tmp_path / "whole")
    lorun.save_pretrained(tmp_path / "sets", adapters_only=True)
    for folder in ("whole", "sets"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "Its stages keep their own weights" in card and "share one denoiser" not in card
        assert "lorun.base_denoiser(stage=0)" in card
    card = (tmp_path / "sets/README.md").read_text()
    load = re.findall(r"^(net = .*|lorun = .*)$", card, re.MULTILINE)
    assert "with the original weights" in load[0] and load[1].startswith(
        "lorun = lorun_adapt.convert(net, share=False, "
    )
    with pytest.warns(UserWarning, match="a set of adapters has 2,211 parameters, and the stages .* have 2,211"):
        again = eval(load[1].removeprefix("lorun = "), {"lorun_adapt": lorun_adapt, "net": net})  # at the default rank
    again.load_adapter(tmp_path / "sets", "default")
    with pytest.raises(LoRunError, match="convert the original network with share=False first"):
        lorun_adapt.from_pretrained(tmp_path / "sets", net)
    assert ": the untouched original network." in (tmp_path / "whole" / SET / "README.md").read_text()
    assert json.loads((tmp_path / "whole" / CONFIG_FILE).read_text())["format"] == 2  # which 0.1.0 refuses
    shared = lorun_adapt.convert(net, rank=1)
    with pytest.raises(LoRunError, match="expected an adapter for the base"):
        shared.load_adapter(tmp_path / "sets", "default")
    lorun_adapt.convert(net, rank=1).save_pretrained(tmp_path / "shared")
    with pytest.raises(LoRunError, match="expected an adapter for the base"):
        lorun.load_adapter(tmp_path / "shared", "default")


@torch.no_grad()
def test_peft_loads_a_stage_on_its_own_denoiser(tmp_path: Path) -> None:
    net = a_network()
    lorun = lorun_adapt.convert(net, LoraConfig(r=2, target_modules=["body"]), share=False)
    with torch.enable_grad():
        train_a_bit(lorun, INPUTS)
    lorun.save_pretrained(tmp_path / "saved")
    for stage in range(3):
        site = lorun.stage_map.groups[0].sites[stage]
        denoiser = lorun.base_denoiser(stage=stage)
        assert torch.equal(denoiser(INPUTS[0]), net.denoisers[stage](INPUTS[0]))
        loaded = PeftModel.from_pretrained(denoiser, str(tmp_path / "saved" / SET / f"stage_0{stage}"))
        expected = lorun.network.get_submodule(site.module)(INPUTS[0])
        assert (
            terms_of(lorun.adapter_of(lorun.stage_map.groups[0], site)) and relative(loaded(INPUTS[0]), expected) < 1e-5
        )
    with pytest.raises(LoRunError, match=r"one of the stages \[0, 1, 2\] of 'denoiser', found None: give stage="):
        lorun.base_denoiser()


def test_a_shared_base_does_not_take_the_weights_of_an_unshared_one() -> None:
    net = a_network()
    unshared, shared = lorun_adapt.convert(net, rank=2, share=False), lorun_adapt.convert(net, rank=2)
    before = fingerprint_of(shared.state_dict())
    with pytest.raises(LoRunError, match="the stages share 'head.weight' here, but they differ in it"):
        shared.load_state_dict(unshared.state_dict())
    assert fingerprint_of(shared.state_dict()) == before
    unshared.load_state_dict(unshared.state_dict())
    shared.load_state_dict(lorun_adapt.convert(net, rank=2).state_dict())


def test_wrong_arguments_are_refused_at_once() -> None:
    net = a_network()
    for share in ("no", None, 0):
        with pytest.raises(LoRunError, match="expected True or False for share"):
            lorun_adapt.convert(net, rank=2, share=share)
    lorun = lorun_adapt.convert(net, rank=2, share=False)
    for stage in ([1], True, 1.0, 3):
        with pytest.raises(LoRunError, match=r"expected one of the stages \[0, 1, 2\]"):
            lorun.base_denoiser(stage=stage)
    with pytest.raises(LoRunError, match="expected patterns of parameters outside the stages, found None"):
        lorun.add_outside("default", None)


def test_terms_that_start_at_zero_learn_as_fast_as_others() -> None:
    net, batches = teacher(), measurements()
    changed, generator = copy.deepcopy(net), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.numel() > 20:  # a kernel
                rows, columns = parameter.flatten(1).shape
                change = torch.randn(rows, 1, generator=generator) @ torch.randn(1, columns, generator=generator)
                parameter.add_(parameter.std() * change.reshape(parameter.shape))
    lorun = lorun_adapt.convert(net, rank=2, share=False)

    def error() -> float:
        with torch.no_grad():
            return sum(float((lorun(*batch) - changed(*batch)).square().mean()) for batch in batches)

    before = error()
    lorun.finetune(batches, "new", teacher=changed, steps=60)
    assert error() < 0.37 * before


def test_a_term_of_the_size_that_zeros_count_as_has_its_share_of_the_energy() -> None:
    spec = TensorSpec("weight", (24, 10, 3, 3), torch.float32, False, ("weight",), nn.Conv2d)
    base = 0.1 * torch.randn(spec.shape, generator=torch.Generator().manual_seed(0))
    term = LowRank.untrained(spec, Setting(6, 0.5), base, torch.Generator().manual_seed(0))
    (size,) = term.sizes_of_zeros(base).values()
    with torch.no_grad():
        term.lora_B.normal_(0, size, generator=torch.Generator().manual_seed(1))
        share = float((term(base) - base).square().sum() / base.square().sum())
    assert share == pytest.approx(6 / 24, rel=0.3)
    assert not term.sizes_of_zeros(base)  # B is no longer zero
    assert not LowRank(torch.zeros(6, 90), torch.zeros(24, 6)).sizes_of_zeros(base)  # nor can A tell

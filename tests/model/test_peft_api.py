"""What users of PEFT expect: its names, its arguments, and what they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions import train_a_bit
from dun_zoo import ZOO, Case
from hub_server import HubServer
from peft import LoraConfig

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel
from lorun_adapt.files.layout import INTERPOLATED


def levels(lorun: LoRunModel) -> LoRunModel:
    """Two sets with known noise, and what is between them running."""
    for name, sigma in (("low", 10), ("high", 50)):
        lorun.copy_adapter("default", name)
        lorun.set_noise(name, sigma=sigma)
    with torch.no_grad():
        for parameter in lorun.adapters["high"].parameters():
            parameter.mul_(1.2)
    assert lorun.select_adapter(20) == INTERPOLATED
    return lorun


def test_from_pretrained_takes_either_order(lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    lorun.save_pretrained(tmp_path / "saved")
    for pair in ((tmp_path / "saved", blocks.net), (blocks.net, str(tmp_path / "saved"))):
        assert torch.equal(lorun_adapt.from_pretrained(*pair)(*blocks.inputs), lorun(*blocks.inputs))
    for pair in ((blocks.net, blocks.net), (tmp_path, tmp_path)):
        with pytest.raises(LoRunError, match="and a network|folder or"):
            lorun_adapt.from_pretrained(*pair)


def test_active_adapters_are_a_list_where_one_runs(lorun: LoRunModel) -> None:
    assert lorun.active_adapters == ["default"]
    lorun.copy_adapter("default", "other")
    lorun.set_adapter({2: "other"})
    assert lorun.active_adapters == {0: "default", 1: "default", 2: "other", 3: "default"}
    before = lorun.active_adapters
    lorun.set_adapter(["other"])
    assert lorun.active_adapters == ["other"]
    lorun.set_adapter(before)
    assert lorun.active_adapters == before
    for several in (["default", "other"], []):
        with pytest.raises(LoRunError, match="one set"):
            lorun.set_adapter(several)
    assert lorun.active_adapters == before


@pytest.mark.parametrize("name", ["list_of_blocks", "list_of_raw_kernels", "attention", "looped"])
def test_an_added_adapter_adds_nothing_until_it_trains(name: str) -> None:
    case = ZOO[name]()
    lorun = lorun_adapt.convert(case.net, rank=2, **case.find())
    train_a_bit(lorun, case.inputs)
    with lorun.disable_adapter():
        base = lorun(*case.inputs)
    lorun.add_adapter("new", LoraConfig(r=3, lora_alpha=6))
    assert not torch.equal(lorun(*case.inputs), base)
    lorun.set_adapter("new")
    torch.testing.assert_close(lorun(*case.inputs), base)  # attention has a path of its own without gradients
    train_a_bit(lorun, case.inputs)
    assert not torch.equal(lorun(*case.inputs), base)
    with pytest.raises(LoRunError, match="'new' already"):
        lorun.add_adapter("new", LoraConfig())
    with pytest.raises(LoRunError, match="do not support lora_dropout=0.5"):
        lorun.add_adapter("other", LoraConfig(lora_dropout=0.5))
    assert lorun.adapter_names == ["default", "new"]


@pytest.mark.parametrize("name", ["list_of_blocks", "list_of_raw_kernels"])  # PEFT can load the first of the two
def test_the_config_of_a_loaded_set_makes_another(name: str, tmp_path: Path) -> None:
    net = ZOO[name]().net
    lorun_adapt.convert(net, LoraConfig(r=2, lora_alpha=6)).save_pretrained(tmp_path / "saved")
    lorun = lorun_adapt.from_pretrained(tmp_path / "saved", net)
    config = lorun.peft_config["default"]
    lorun.add_adapter("new", config)
    sizes = [sum(p.numel() for p in lorun.adapters[name].parameters()) for name in ("default", "new")]
    assert sizes[0] == sizes[1]
    assert lorun.converted().sets["new"].config.lora_alpha == config.lora_alpha
    assert sum(p.numel() for p in lorun_adapt.convert(net, config).adapters["default"].parameters()) == sizes[0]


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_a_broken_pattern_is_an_error(option: str, lorun: LoRunModel) -> None:
    value: Any = {"conv(": 2} if option.endswith("pattern") else "conv("
    with pytest.raises(LoRunError, match=r"'conv\(' is not a regular expression"):
        lorun.add_adapter("new", LoraConfig(**{option: value}))
    assert lorun.adapter_names == ["default"]


def test_selected_adapters_are_saved(lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    lorun.copy_adapter("default", "other")
    lorun.copy_adapter("default", "third")
    lorun.save_pretrained(tmp_path / "saved", selected_adapters=["other", "third"])
    again = lorun_adapt.from_pretrained(tmp_path / "saved", blocks.net)
    assert again.adapter_names == ["other", "third"] and again.active_adapters == ["other"]
    assert torch.equal(again(*blocks.inputs), lorun(*blocks.inputs))
    for wrong in (["nothing"], [INTERPOLATED], []):
        with pytest.raises(LoRunError, match="selected_adapters|select one"):
            lorun.save_pretrained(tmp_path / "wrong", selected_adapters=wrong)
    assert not (tmp_path / "wrong").exists() and lorun.active_adapters == ["default"]


def test_an_interpolated_set_is_never_saved(lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    levels(lorun)
    lorun.save_pretrained(tmp_path / "saved")
    again = lorun_adapt.from_pretrained(tmp_path / "saved", blocks.net)
    assert again.adapter_names == ["default", "low", "high"] and again.active_adapters == ["low"]  # the nearest
    assert lorun.active_adapters == [INTERPOLATED]


def test_the_name_of_the_interpolated_set_is_reserved(lorun: LoRunModel, tmp_path: Path) -> None:
    lorun.save_pretrained(tmp_path / "saved")
    for make in (
        lambda: lorun.copy_adapter("default", INTERPOLATED),
        lambda: lorun.add_adapter(INTERPOLATED, LoraConfig()),
        lambda: lorun.add_weighted_adapter(["default"], [1], INTERPOLATED),
        lambda: lorun.load_adapter(tmp_path / "saved", INTERPOLATED),
        lambda: lorun.finetune([torch.zeros(1)], INTERPOLATED, steps=1, loss=lambda *_: torch.zeros(())),
    ):
        with pytest.raises(LoRunError, match="reserved"):
            make()
    assert lorun.adapter_names == ["default"]


def test_a_pull_request_with_a_message(hub: HubServer, lorun: LoRunModel, monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "alice-token")
    given = {}
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **options: given.update(options) or "url")
    assert lorun.push_to_hub("alice/net", commit_message="Two sets", create_pr=True) == "url"
    assert given["commit_message"] == "Two sets" and given["create_pr"] is True
    lorun.push_to_hub("alice/net")
    assert "default" in given["commit_message"] and given["create_pr"] is False


def test_trainable_parameters_are_counted(lorun: LoRunModel, capsys) -> None:
    trainable, total = lorun.get_nb_trainable_parameters()
    assert trainable == sum(p.numel() for p in lorun.adapters["default"].parameters())
    assert total == lorun.num_parameters() > trainable > 0
    lorun.print_trainable_parameters()
    assert f"trainable params: {trainable:,} || all params: {total:,}" in capsys.readouterr().out
    lorun.set_adapter("default", inference_mode=True)
    assert lorun.get_nb_trainable_parameters() == (0, total)


def test_other_sets_are_merged_by_name(lorun: LoRunModel, blocks: Case) -> None:
    levels(lorun)
    low, high = (lorun.merge_and_unload(adapter_names=[name]) for name in ("low", "high"))
    lorun.set_adapter("high")
    assert torch.allclose(high(*blocks.inputs), lorun(*blocks.inputs), atol=1e-6)
    both, base = lorun.merge_and_unload(adapter_names=["low", "high"]).state_dict(), lorun.base.state_dict()
    for name, tensor in both.items():  # what each adds to the base
        expected = low.state_dict()[name] + high.state_dict()[name] - base[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(LoRunError, match="no adapter set 'nothing'"):
        lorun.merge_and_unload(adapter_names=["nothing"])
    with pytest.raises(LoRunError, match="no adapter set to merge"):
        lorun.merge_and_unload(adapter_names=[])


def test_a_safe_merge_refuses_nan(lorun: LoRunModel) -> None:
    assert lorun.merge_and_unload(safe_merge=True) is not None
    with torch.no_grad():
        next(lorun.adapters.parameters()).fill_(float("nan"))
    lorun.merge_and_unload()
    with pytest.raises(LoRunError, match="NaN or Inf"):
        lorun.merge_and_unload(safe_merge=True)


def test_attributes_of_the_original_are_reachable(lorun: LoRunModel) -> None:
    assert lorun.blocks is lorun.network.blocks and len(lorun.blocks) == 4
    assert hasattr(lorun, "blocks") and not hasattr(lorun, "no_such_thing")
    with pytest.raises(AttributeError, match="no_such_thing"):
        lorun.no_such_thing  # noqa: B018


def test_adapters_by_group_and_site(lorun: LoRunModel, tmp_path: Path) -> None:
    (group,) = lorun.stage_map.groups
    lorun.save_pretrained(tmp_path / "saved")
    lorun.load_adapter(tmp_path / "saved", "one", stage=2)
    assert lorun.adapter_of(group, group.sites[2], "one") is lorun.adapters["one"]["stage_02"]["denoiser"]
    assert lorun.adapter_of(group, group.sites[2]) is lorun.adapters["default"]["stage_02"]["denoiser"]
    with pytest.raises(LoRunError, match="no adapter for stage 0, only for .2."):
        lorun.adapter_of(group, group.sites[0], "one")
    with pytest.raises(LoRunError, match="no adapter set 'nothing'"):
        lorun.adapter_of(group, group.sites[0], "nothing")


def test_rank_is_a_number_of_ranks(blocks: Case) -> None:
    with pytest.raises(LoRunError, match="as energy"):
        lorun_adapt.convert(blocks.net, rank=0.5)
    for wrong in (0, 1, 1.5, -0.1, True, "0.5", float("nan")):
        with pytest.raises(LoRunError, match="between 0 and 1"):
            lorun_adapt.convert(blocks.net, energy=wrong)
    low, high = (lorun_adapt.convert(blocks.net, energy=share).num_parameters() for share in (0.3, 0.9))
    assert low < high


def test_the_files_say_one_noise_or_a_schedule(lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    lorun.set_noise("default", noise_schedule=[4, 3, 2, 1])
    lorun.save_pretrained(tmp_path / "saved")
    entry = json.loads((tmp_path / "saved/adapters/default/set_config.json").read_text())
    assert entry["noise_schedule"] == [4, 3, 2, 1]
    info = lorun_adapt.from_pretrained(tmp_path / "saved", blocks.net).adapter_info["default"]
    assert info.noise_schedule == (4, 3, 2, 1) and info.sigma is None and info.noise == (4, 3, 2, 1)

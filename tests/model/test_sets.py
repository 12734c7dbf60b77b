"""Adapter sets on one base: which runs, loading one stage, deleting, saving together."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conversions import train_a_bit
from dun_zoo import Block, Case, Denoiser, ListOfBlocks

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel


@pytest.fixture
def lorun(blocks: Case) -> LoRunModel:
    return lorun_adapt.convert(blocks.net, rank=2)


@pytest.fixture
def two(lorun: LoRunModel, saved: Path, blocks: Case) -> tuple[LoRunModel, torch.Tensor, torch.Tensor]:
    """Two sets on one base, and the output of each; ``default`` is the trained one."""
    untrained = lorun(*blocks.inputs).detach()
    train_a_bit(lorun, blocks.inputs)
    lorun.load_adapter(saved, "first")
    return lorun, lorun(*blocks.inputs).detach(), untrained


def test_set_adapter(two, blocks: Case) -> None:
    lorun, trained, untrained = two
    assert lorun.adapter_names == ["default", "first"]
    assert torch.equal(lorun(*blocks.inputs), trained)
    lorun.set_adapter("first")
    assert torch.equal(lorun(*blocks.inputs), untrained)
    trains = {name for name, p in lorun.named_parameters() if p.requires_grad}
    assert trains and all(name.startswith("adapters.first.") for name in trains)
    lorun.set_adapter({0: "default", 3: "default"})
    assert lorun.active_adapters == {0: "default", 1: "first", 2: "first", 3: "default"}
    mixed = lorun(*blocks.inputs)
    assert not torch.equal(mixed, trained) and not torch.equal(mixed, untrained)
    weight = lorun.network.blocks[0].denoiser.body.weight
    lorun.set_adapter("default")
    assert torch.equal(lorun.network.blocks[0].denoiser.body.weight, weight)
    assert torch.equal(lorun(*blocks.inputs), trained)


@pytest.mark.parametrize(
    "wanted", ["nothing", {0: "nothing"}, {7: "first"}, {-1: "first"}, None, {"first"}, {0: ["first"]}]
)
def test_wrong_sets_change_nothing(two, blocks: Case, wanted) -> None:
    lorun, trained, _ = two
    with pytest.raises(LoRunError, match="expected a stage in|no adapter set 'nothing'|a stage runs one set, not"):
        lorun.set_adapter(wanted)
    assert torch.equal(lorun(*blocks.inputs), trained)


def test_disable_adapter_is_the_bare_base(two, blocks: Case) -> None:
    lorun, trained, _ = two
    with lorun.disable_adapter():
        assert torch.equal(lorun(*blocks.inputs), lorun.base(*blocks.inputs))
        assert all(
            torch.equal(a, b)
            for a, b in zip(lorun.network.blocks[0].parameters(), lorun.network.blocks[3].parameters())
        )
    with pytest.raises(KeyError), lorun.disable_adapter():
        raise KeyError
    assert torch.equal(lorun(*blocks.inputs), trained)


def test_blocks_without_adapters_may_overlap(two, blocks: Case) -> None:
    lorun, trained, _ = two
    first, second = lorun.disable_adapter(), lorun.disable_adapter()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert lorun.network is lorun.base
    second.__exit__(None, None, None)
    assert torch.equal(lorun(*blocks.inputs), trained)


def test_modes_of_modules_stay_around_blocks_without_adapters(lorun: LoRunModel) -> None:
    lorun.train()
    lorun.network.blocks[0].eval()
    with lorun.disable_adapter():
        assert lorun.network.training and not lorun.network.blocks[0].training
        lorun.network.blocks[1].eval()
    assert [block.training for block in lorun.network.blocks] == [False, False, True, True]


def test_delete_adapter(two, blocks: Case) -> None:
    lorun, trained, _ = two
    for name in ("default", "nothing"):
        with pytest.raises(LoRunError):
            lorun.delete_adapter(name)
    count = lorun.num_parameters()
    lorun.delete_adapter("first")
    assert lorun.adapter_names == ["default"] and lorun.num_parameters() < count
    assert torch.equal(lorun(*blocks.inputs), trained)


def test_sets_are_saved_and_loaded_together(two, blocks: Case, tmp_path: Path) -> None:
    lorun, trained, untrained = two
    lorun.save_pretrained(tmp_path / "both")
    loaded = lorun_adapt.from_pretrained(tmp_path / "both", blocks.net)
    assert loaded.adapter_names == ["default", "first"]
    assert torch.equal(loaded(*blocks.inputs), trained)
    assert all(name.startswith("adapters.default.") for name, p in loaded.named_parameters() if p.requires_grad)
    loaded.set_adapter("first")
    assert torch.equal(loaded(*blocks.inputs), untrained)
    loaded.set_adapter({2: "default"})
    loaded.save_pretrained(tmp_path / "both")
    assert lorun_adapt.from_pretrained(tmp_path / "both", blocks.net).active_adapters == loaded.active_adapters


def test_one_stage_from_a_file(two, saved: Path, blocks: Case) -> None:
    lorun, _, untrained = two
    for source in (saved, saved / "adapters/default", saved / "adapters/default/stage_02"):
        lorun.load_adapter(source, "single", stage=2)
        with pytest.raises(LoRunError, match="'single' has no adapter for stage 0, only for \\[2\\]"):
            lorun.set_adapter("single")
        lorun.set_adapter({2: "single"})
        one = lorun(*blocks.inputs)
        lorun.set_adapter({2: "first"})
        assert torch.equal(lorun(*blocks.inputs), one)
        lorun.delete_adapter("single")
    lorun.set_adapter("default")
    for stage in range(4):  # into a set that runs
        lorun.load_adapter(saved, "default", stage=stage)
    assert torch.equal(lorun(*blocks.inputs), untrained)


@pytest.mark.parametrize("name", ["", "../evil", "a.b", "a/b", "keys", "forward", "-x"])
def test_names_that_cannot_be(lorun: LoRunModel, saved: Path, name: str) -> None:
    with pytest.raises(LoRunError, match="cannot be called"):
        lorun.load_adapter(saved, name)


def test_adapters_of_another_base_are_refused(lorun: LoRunModel, saved: Path, blocks: Case) -> None:
    expected = lorun(*blocks.inputs)
    torch.manual_seed(5)
    other = lorun_adapt.convert(ListOfBlocks([Block(Denoiser()) for _ in range(4)]), rank=2)
    with pytest.raises(LoRunError, match="for the base"):
        other.load_adapter(saved, "first")
    assert other.adapter_names == ["default"]
    with pytest.raises(LoRunError, match="no folder at"):
        lorun.load_adapter(saved / "nothing", "first")
    assert torch.equal(lorun(*blocks.inputs), expected)


def test_a_set_that_is_activated_in_a_block_without_adapters_runs_after_it(two, blocks: Case) -> None:
    lorun, *_ = two
    with lorun.disable_adapter():
        lorun.set_adapter("first")
        assert lorun.network is lorun.base
        duplicate = copy.deepcopy(lorun)
        with pytest.raises(LoRunError, match=r"training needs the adapters: train outside of disable_adapter\(\)"):
            lorun.recover(blocks.net, [blocks.inputs], steps=1)
        with pytest.raises(LoRunError, match=r"train outside of disable_adapter\(\)"):
            lorun.finetune([blocks.inputs], "new", teacher=blocks.net, steps=1)
    assert lorun.active_adapters == ["first"] and lorun.network is not lorun.base
    expected = lorun(*blocks.inputs)
    assert torch.equal(duplicate(*blocks.inputs), expected)
    with duplicate.disable_adapter():
        assert not torch.equal(duplicate(*blocks.inputs), expected)
    assert torch.equal(duplicate(*blocks.inputs), expected)


def test_a_set_without_the_stage_that_is_asked_for(lorun: LoRunModel, saved: Path, tmp_path: Path) -> None:
    lorun.load_adapter(saved / "adapters/default/stage_01", "part", stage=1)
    lorun.save_pretrained(tmp_path / "new")
    with pytest.raises(LoRunError, match="has no adapter for stage 0, only stage_01: choose"):
        lorun.load_adapter(tmp_path / "new/adapters/part", "other", stage=0)
    assert lorun.adapter_names == ["default", "part"]


def test_more_sets_than_a_folder_may_have(lorun: LoRunModel, tmp_path: Path) -> None:
    for number in range(100):
        lorun.copy_adapter("default", f"set{number}")
    with pytest.raises(LoRunError, match="expected at most 100 to save, found 101 sets: name some in selected_ad"):
        lorun.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    lorun.save_pretrained(tmp_path / "new", selected_adapters=lorun.adapter_names[1:])
    assert len(lorun_adapt.from_pretrained(tmp_path / "new", lorun.base).adapter_names) == 100

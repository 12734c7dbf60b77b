"""Folders: what is in them, that they load whole or not at all, and that they appear so."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conversions import train_a_bit
from dun_zoo import ZOO, Block, Case, Denoiser, HeadBodyTail, ListOfBlocks
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel
from lorun_adapt.disk import folder
from lorun_adapt.files import save as checkpoint


@pytest.fixture
def lorun(blocks: Case) -> LoRunModel:
    return lorun_adapt.convert(blocks.net, rank=2)


def files(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def test_the_folder(saved: Path, blocks: Case, lorun: LoRunModel) -> None:
    stages = [
        f"adapters/default/stage_0{k}/{name}"
        for k in range(4)
        for name in ("adapter_config.json", "adapter_model.safetensors")
    ]
    cards = ["README.md", "adapters/default/README.md"]
    assert sorted(files(saved)) == sorted([*cards, "base.safetensors", "lorun_config.json", *stages])
    description = json.loads((saved / "lorun_config.json").read_text())
    assert set(description["files"]) == set(files(saved)) - {"lorun_config.json"}
    assert all(folder.sha256(saved / name) == digest for name, digest in description["files"].items())
    with safe_open(saved / "base.safetensors", "pt") as base:
        assert set(base.keys()) == {name for name in blocks.net.state_dict() if name.startswith("blocks.0.")}
    config = LoraConfig.from_pretrained(str(saved / "adapters/default/stage_02"))
    assert config.r == 2 and config.peft_type == "LORA"
    size = sum(len(content) for name, content in files(saved).items() if name.endswith(".safetensors"))
    assert size < lorun.report().network_after.num_bytes + 9000  # headers


def test_a_stage_of_several_modules_has_a_folder_for_each(tmp_path: Path) -> None:
    lorun_adapt.convert(ZOO["pair_blocks"]().net, rank=2).save_pretrained(tmp_path / "saved")
    names = {name for name in files(tmp_path / "saved") if name.startswith("adapters/default/stage_01")}
    assert names == {
        f"adapters/default/stage_01/blocks_{part}/{file}"
        for part in ("encoder", "decoder")
        for file in ("adapter_config.json", "adapter_model.safetensors")
    }


def test_smaller_files(lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    lorun.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert load_file(tmp_path / "half/base.safetensors")["blocks.0.denoiser.body.weight"].dtype == torch.float16
    loaded = lorun_adapt.from_pretrained(tmp_path / "half", blocks.net)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded(*blocks.inputs), lorun(*blocks.inputs), rtol=1e-2, atol=1e-3)
    for model in (lorun, loaded, loaded.half()):  # one base, however it is stored
        model.load_adapter(tmp_path / "half", "other")
    with pytest.raises(LoRunError, match="int16"):
        lorun.save_pretrained(tmp_path / "half", dtype=torch.int16)


def test_a_base_that_stays_keeps_its_name(lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    """A smaller file has the name of the base that it was rounded from."""
    lorun.save_pretrained(tmp_path / "half", dtype=torch.float16)
    loaded = lorun_adapt.from_pretrained(tmp_path / "half", blocks.net)
    with pytest.raises(LoRunError):
        loaded.recover(blocks.net, [torch.zeros(1)], steps=3)
    loaded.load_state_dict(loaded.state_dict())
    assert loaded.fingerprint == lorun.fingerprint
    loaded.load_adapter(tmp_path / "half", "again")
    loaded.load_state_dict({name: 2 * tensor for name, tensor in loaded.state_dict().items()})
    assert loaded.fingerprint != lorun.fingerprint


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8])
def test_smaller_files_stay_the_same(case: Case, tmp_path: Path, dtype: torch.dtype) -> None:
    lorun = lorun_adapt.convert(case.net, rank=1, **case.find())
    train_a_bit(lorun, case.inputs)
    for place in ("once", "twice", "thrice"):
        lorun.save_pretrained(tmp_path / place, dtype=dtype)
        lorun = lorun_adapt.from_pretrained(tmp_path / place, case.net)
    assert files(tmp_path / "once") == files(tmp_path / "twice") == files(tmp_path / "thrice")


def test_loaded_is_what_was_saved(saved: Path, blocks: Case, lorun: LoRunModel) -> None:
    fresh = ListOfBlocks([Block(Denoiser()) for _ in range(4)])
    weights = {name: p.clone() for name, p in fresh.state_dict().items()}
    loaded = lorun_adapt.from_pretrained(saved, fresh)
    assert torch.equal(loaded(*blocks.inputs), lorun(*blocks.inputs))
    assert str(loaded.report()) == str(lorun.report())
    assert all(torch.equal(p, weights[name]) for name, p in fresh.state_dict().items())
    assert loaded.peft_config["default"].r == 2


def test_saving_again_replaces(saved: Path, lorun: LoRunModel, blocks: Case) -> None:
    (saved / "notes").mkdir()
    (saved / "notes/mine.txt").write_text("kept")
    (saved / "adapters/default/stage_09").mkdir()
    (saved / "adapters/default/stage_00/mine.txt").write_text("kept")
    (saved / "adapters/link").symlink_to(saved / "notes")
    train_a_bit(lorun, blocks.inputs)
    lorun.save_pretrained(saved)
    for place in ("notes", "adapters/default/stage_00", "adapters/link"):
        assert (saved / place / "mine.txt").read_text() == "kept"
    assert not (saved / "adapters/default/stage_09").exists()
    assert torch.equal(lorun_adapt.from_pretrained(saved, blocks.net)(*blocks.inputs), lorun(*blocks.inputs))
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


@pytest.mark.parametrize("edited", ["README.md", "adapters/default/README.md"])
def test_an_edited_card_is_kept_until_it_is_deleted(edited: str, saved: Path, lorun: LoRunModel, blocks: Case) -> None:
    other = "README.md" if edited != "README.md" else "adapters/default/README.md"
    written = (saved / edited).read_text()
    for turn in range(2):
        (saved / edited).write_text(f"my own words {turn}")
        with pytest.warns(UserWarning, match=f"{edited} was edited, so it is kept"):
            lorun.save_pretrained(saved)
        with pytest.warns(UserWarning, match=f"{edited} was edited, so it is kept"):
            checkpoint.update_cards(lorun.converted(), saved)
        assert (saved / edited).read_text() == f"my own words {turn}"
        assert "my own words" not in (saved / other).read_text()
    lorun_adapt.from_pretrained(saved, blocks.net)
    (saved / edited).unlink()
    lorun.save_pretrained(saved)
    assert (saved / edited).read_text() == written
    (saved / edited).write_text("my own words")
    with pytest.warns(UserWarning, match="was edited"):
        lorun_adapt.convert(ZOO["list_of_blocks"]().net, rank=1).save_pretrained(saved)
    lorun_adapt.convert(ZOO["attention"]().net, rank=1).save_pretrained(saved)
    assert (saved / edited).read_text() != "my own words", "they were on another network"


def test_an_empty_folder_is_filled(lorun: LoRunModel, tmp_path: Path) -> None:
    lorun.save_pretrained(tmp_path)
    assert (tmp_path / "lorun_config.json").is_file()


def test_other_folders_are_not_replaced(lorun: LoRunModel, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LoRunError, match="found other files"):
        lorun.save_pretrained(tmp_path)
    with pytest.raises(LoRunError, match="found a file"):
        lorun.save_pretrained(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work" and len(list(tmp_path.iterdir())) == 1


def test_the_current_folder_is_not_replaced(lorun: LoRunModel, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoRunError, match="the current directory"):
        lorun.save_pretrained(".")
    lorun.save_pretrained("within")
    assert (tmp_path / "within/lorun_config.json").exists()


@pytest.mark.parametrize("exchange", [True, False])
def test_a_save_that_fails_leaves_the_old_folder(saved: Path, lorun: LoRunModel, monkeypatch, exchange: bool) -> None:
    before = files(saved)

    def fail(*_):
        raise OSError(28, "No space left on device")

    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda *_: False)
    monkeypatch.setattr(checkpoint, "to_safetensors", fail)
    with pytest.raises(LoRunError, match="No space left.*unchanged"):
        lorun.save_pretrained(saved)
    monkeypatch.undo()
    if not exchange:
        monkeypatch.setattr(folder, "_exchange", lambda *_: False)
        monkeypatch.setattr(folder.os, "rename", fail)
        with pytest.raises(LoRunError, match="No space left.*unchanged"):
            lorun.save_pretrained(saved)
    assert files(saved) == before
    assert [p.name for p in saved.parent.iterdir()] == ["saved"]


def test_a_killed_save_leaves_the_old_folder_or_the_new(saved: Path, lorun: LoRunModel, blocks: Case) -> None:
    before = files(saved)
    train_a_bit(lorun, blocks.inputs)
    seen, swap = set(), folder._swap
    for step in ("to_safetensors", "model_card", "sha256", "replace"):
        child = os.fork()
        if child == 0:  # die within the save, without any cleaning up
            if step == "replace":
                folder._swap = lambda *args: (swap(*args), os._exit(9))
            else:
                setattr(checkpoint, step, lambda *_: os._exit(9))
            lorun.save_pretrained(saved)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        loaded = lorun_adapt.from_pretrained(saved, blocks.net)
        seen.add(files(saved) == before)
        if files(saved) != before:
            assert torch.equal(loaded(*blocks.inputs), lorun(*blocks.inputs))
    assert seen == {True, False}


def test_without_an_exchange_a_kill_between_two_renames_loses_nothing(
    saved: Path, lorun: LoRunModel, blocks: Case
) -> None:
    before, rename = files(saved), os.rename
    for use in ("load", "save"):
        child = os.fork()
        if child == 0:
            folder._exchange = lambda *_: False
            folder.os.rename = lambda *_: os._exit(9)  # the second of the two; the first is os.replace
            lorun.save_pretrained(saved)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        assert folder.os.rename is rename and not saved.exists()
        if use == "load":
            loaded = lorun_adapt.from_pretrained(saved, blocks.net)
            assert files(saved) == before and torch.equal(loaded(*blocks.inputs), lorun(*blocks.inputs))
        else:
            lorun.save_pretrained(saved)
    assert files(saved) == before and [path.name for path in saved.parent.iterdir()] == ["saved"]


# --- what does not load --------------------------------------------------------------------------


REFUSED = "|".join(
    ["expected .*found", "cannot read .*; ", "not valid JSON: ", "no lorun_config.json in .*: ", "has an invalid .*: "]
    + ["wrong hash.*: "]
)


def test_damage_is_an_error(saved: Path, blocks: Case, tmp_path: Path) -> None:
    for name in files(saved):
        if Path(name).name == "README.md":
            continue
        for damage in (lambda content: content[:-7], lambda content: content[:40] + b"\xff" + content[41:], None):
            shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
            shutil.copytree(saved, tmp_path / "damaged")
            if damage is None:
                (tmp_path / "damaged" / name).unlink()
            else:
                (tmp_path / "damaged" / name).write_bytes(damage((saved / name).read_bytes()))
            with pytest.raises(
                LoRunError,
                match=REFUSED,
            ):
                lorun_adapt.from_pretrained(tmp_path / "damaged", blocks.net)


def test_other_networks_are_errors(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(LoRunError, match="the class ListOfBlocks, found HeadBodyTail"):
        lorun_adapt.from_pretrained(saved, HeadBodyTail())
    with pytest.raises(LoRunError, match="blocks.3|stages"):
        lorun_adapt.from_pretrained(saved, ListOfBlocks([Block(Denoiser()) for _ in range(3)]))
    with pytest.raises(LoRunError, match=r"'blocks.4.step'"):
        lorun_adapt.from_pretrained(saved, ListOfBlocks([Block(Denoiser()) for _ in range(5)]))
    with pytest.raises(LoRunError, match=r"'denoiser.head.weight' of shape \[8, 1, 3, 3\]"):
        lorun_adapt.from_pretrained(saved, ListOfBlocks([Block(Denoiser(6)) for _ in range(4)]))
    with pytest.raises(LoRunError, match="lorun_config.json"):
        lorun_adapt.from_pretrained(tmp_path, HeadBodyTail())

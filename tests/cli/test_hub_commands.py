"""Commands push, list and pull."""

from __future__ import annotations

from pathlib import Path

import torch
from conversions import SET
from dun_zoo import Case
from hub_server import HubServer
from tasks import command

import lorun_adapt
from lorun_adapt import LoRunModel


def test_push_list_and_pull(
    hub: HubServer, lorun: LoRunModel, blocks: Case, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "alice-token")
    lorun.save_pretrained(tmp_path / "saved")
    code, text = command(capsys, monkeypatch, "push", tmp_path / "saved", "alice/net", "--private")
    assert code == 0 and hub.endpoint in text and hub.repos["alice/net"].private
    for source in (tmp_path / "saved", "alice/net"):
        code, text = command(capsys, monkeypatch, "list", source)
        assert code == 0 and "ListOfBlocks, with its base" in text and "default" in text and " 4 " in text
    code, text = command(capsys, monkeypatch, "pull", "alice/net", "--out", tmp_path / "pulled")
    assert code == 0
    for file in (tmp_path / "saved").rglob("*.*"):
        assert (tmp_path / "pulled" / file.relative_to(tmp_path / "saved")).read_bytes() == file.read_bytes()
    assert torch.equal(
        lorun_adapt.from_pretrained(tmp_path / "pulled", blocks.net)(*blocks.inputs), lorun(*blocks.inputs)
    )


def test_commands_end_with_2(hub: HubServer, lorun: LoRunModel, tmp_path: Path, capsys, monkeypatch) -> None:
    lorun.save_pretrained(tmp_path / "saved")
    monkeypatch.setenv("HF_TOKEN", "alice-token")
    (tmp_path / "saved" / SET / "stage_01" / "adapter_config.json").write_text("{}")
    for arguments, message in (
        (("push", tmp_path / "saved", "alice/net"), "is missing or has changed since it was saved"),
        (("pull", "alice/none", "--out", tmp_path / "out"), "no repository alice/none, or it is private"),
        (("list", tmp_path), "neither a saved conversion nor a repository user/name"),
        (("list", tmp_path / "saved", "--revision", "v1"), "is a folder, which has no revisions"),
    ):
        code, text = command(capsys, monkeypatch, *arguments)
        assert code == 2 and message in text
    assert not hub.repos and not (tmp_path / "out").exists()

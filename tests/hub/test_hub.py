"""Conversions and adapters on the Hub, with the real client."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import hub_server
import pytest
import torch
from conversions import SET, train_a_bit
from dun_zoo import ZOO, Case
from hub_server import ROUTES, HubServer
from huggingface_hub import constants, utils
from tasks import command

import lorun_adapt
from lorun_adapt import LoRunError, LoRunModel
from lorun_adapt.files.description import as_text
from lorun_adapt.hub.repository import Repository
from lorun_adapt.hub.transfer import pull, push

CARD = b"---\nlicense: mit\n---\nedited on the Hub"
STAGE_2 = {f"{SET}/stage_02/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")}


@pytest.fixture
def pushed(hub: HubServer, lorun: LoRunModel) -> HubServer:
    lorun.push_to_hub("alice/net", token="alice-token")
    hub.forget()
    return hub


def fetched(hub: HubServer) -> set[str]:
    return set(hub.downloads)


def files_of_stage_2(lorun: LoRunModel, folder: Path) -> dict[str, bytes]:
    """As PEFT writes them: of one adapter, without a description."""
    lorun.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in (folder / SET / "stage_02").iterdir()}


# --- there and back ------------------------------------------------------------------------------


def test_what_is_pushed_comes_back(hub: HubServer, lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    address = lorun.push_to_hub("alice/net", token="alice-token")
    assert address.startswith(hub.endpoint)
    lorun.save_pretrained(tmp_path / "saved")
    files = {p.relative_to(tmp_path / "saved").as_posix(): p.read_bytes() for p in (tmp_path / "saved").rglob("*.*")}
    assert {name: data for name, data in hub.files("alice/net").items() if name != ".gitattributes"} == files
    loaded = lorun_adapt.from_pretrained("alice/net", blocks.net)
    assert torch.equal(loaded(*blocks.inputs), lorun(*blocks.inputs))
    wanted = {name: data for name, data in files.items() if Path(name).name != "README.md"}
    assert fetched(hub) <= set(wanted)  # of equal files the client takes one
    assert {wanted[name] for name in fetched(hub)} == set(wanted.values())


def test_a_push_replaces_what_was_there(pushed: HubServer, lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    pushed.add_commit("alice/net", {"notes.txt": b"mine"})
    lorun.save_pretrained(tmp_path / "saved")
    lorun.load_adapter(tmp_path / "saved", "second")
    lorun.set_adapter("second")
    train_a_bit(lorun, blocks.inputs)
    lorun.delete_adapter("default")
    lorun.push_to_hub("alice/net", token="alice-token", dtype=torch.float16)
    files = pushed.files("alice/net")
    assert files["notes.txt"] == b"mine"
    assert {name.split("/")[1] for name in files if name.startswith("adapters/")} == {"second"}
    loaded = lorun_adapt.from_pretrained("alice/net", blocks.net)
    torch.testing.assert_close(loaded(*blocks.inputs), lorun(*blocks.inputs), atol=1e-3, rtol=1e-2)


def test_revisions(pushed: HubServer, lorun: LoRunModel, blocks: Case) -> None:
    before = lorun(*blocks.inputs).detach()
    pushed.add_tag("alice/net", "v1")
    train_a_bit(lorun, blocks.inputs)
    lorun.push_to_hub("alice/net", revision="next", token="alice-token")
    for revision, expected in ((None, before), ("v1", before), ("next", lorun(*blocks.inputs))):
        loaded = lorun_adapt.from_pretrained("alice/net", blocks.net, revision=revision)
        assert torch.equal(loaded(*blocks.inputs), expected)
    with pytest.raises(LoRunError, match="no revision 'v9' of alice/net"):
        lorun_adapt.from_pretrained("alice/net", blocks.net, revision="v9")


def test_all_files_are_of_one_commit(pushed: HubServer, lorun: LoRunModel, blocks: Case, monkeypatch) -> None:
    """A push between two downloads does not mix two versions."""
    before = lorun(*blocks.inputs).detach()
    train_a_bit(lorun, blocks.inputs)
    lorun.push_to_hub("alice/other", token="alice-token")
    newer = pushed.repos["alice/other"].find("main").files
    answer, pushes = HubServer._resolve, []

    def resolve(self, request, repo, revision, file):
        reply = answer(self, request, repo, revision, file)
        if request.method == "GET" and file == "lorun_config.json" and not pushes:
            pushes.append(file)
            self.repos["alice/net"].commit("main", dict(newer))
        return reply

    routes = [(method, pattern, resolve if function is answer else function) for method, pattern, function in ROUTES]
    monkeypatch.setattr(hub_server, "ROUTES", routes)
    loaded = lorun_adapt.from_pretrained("alice/net", blocks.net)
    assert pushes and torch.equal(loaded(*blocks.inputs), before)


# --- only what is needed -------------------------------------------------------------------------


@pytest.mark.parametrize("subfolder", [None, SET, f"{SET}/stage_02"])
def test_one_stage_does_not_pull_the_rest(pushed: HubServer, lorun: LoRunModel, blocks: Case, subfolder) -> None:
    expected = lorun(*blocks.inputs)
    lorun.load_adapter("alice/net", "theirs", stage=2, subfolder=subfolder)
    assert fetched(pushed) == {"lorun_config.json", *STAGE_2}
    lorun.set_adapter({2: "theirs"})
    assert torch.equal(lorun(*blocks.inputs), expected)


@pytest.mark.parametrize("subfolder", [None, SET])
def test_a_set_does_not_pull_the_base(pushed: HubServer, lorun: LoRunModel, blocks: Case, subfolder) -> None:
    expected = lorun(*blocks.inputs)
    train_a_bit(lorun, blocks.inputs)
    lorun.load_adapter("alice/net", "theirs", subfolder=subfolder)
    assert all(name == "lorun_config.json" or name.startswith(f"{SET}/stage_") for name in fetched(pushed))
    lorun.set_adapter("theirs")
    assert torch.equal(lorun(*blocks.inputs), expected)


def test_a_conversion_in_a_subfolder(hub: HubServer, lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    lorun.save_pretrained(tmp_path / "saved")
    files = {f"nets/a/{p.relative_to(tmp_path / 'saved').as_posix()}": p for p in (tmp_path / "saved").rglob("*.*")}
    hub.add_repo("alice/many", {name: path.read_bytes() for name, path in files.items()})
    loaded = lorun_adapt.from_pretrained("alice/many", blocks.net, subfolder="nets/a")
    assert torch.equal(loaded(*blocks.inputs), lorun(*blocks.inputs))
    loaded.load_adapter("alice/many", "one", stage=1, subfolder=f"nets/a/{SET}/stage_01")
    assert loaded.adapter_names == ["default", "one"]
    with pytest.raises(LoRunError, match="without '..'"):
        loaded.load_adapter("alice/many", "two", subfolder="nets/../nets/a")


def test_an_adapter_of_peft_s(hub: HubServer, lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    expected = lorun(*blocks.inputs)
    files = files_of_stage_2(lorun, tmp_path / "saved")
    hub.add_repo("bob/stage", files)
    hub.add_repo("bob/stages", {f"here/{name}": data for name, data in files.items()})
    lorun.load_adapter("bob/stage", "bob", stage=2)
    lorun.load_adapter("bob/stages", "bob_too", stage=2, subfolder="here")
    for name in ("bob", "bob_too"):
        lorun.set_adapter({2: name})
        assert torch.equal(lorun(*blocks.inputs), expected)


# --- adapters alone ------------------------------------------------------------------------------


def test_adapters_without_their_base(hub: HubServer, lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    lorun.push_to_hub("alice/adapters", adapters_only=True, token="alice-token")
    assert "base.safetensors" not in hub.files("alice/adapters")
    with pytest.raises(LoRunError, match="the repository has adapters but no base"):
        lorun_adapt.from_pretrained("alice/adapters", blocks.net)
    expected = lorun(*blocks.inputs)
    train_a_bit(lorun, blocks.inputs)
    lorun.load_adapter("alice/adapters", "theirs")
    lorun.set_adapter("theirs")
    assert torch.equal(lorun(*blocks.inputs), expected)
    other = lorun_adapt.convert(ZOO["list_of_blocks"]().net, rank=1)
    with pytest.raises(LoRunError, match="for the base"):
        other.load_adapter("alice/adapters", "theirs")
    lorun.save_pretrained(tmp_path / "alone", adapters_only=True)
    with pytest.raises(LoRunError, match="has adapters but no base"):
        lorun_adapt.from_pretrained(tmp_path / "alone", blocks.net)


@pytest.mark.parametrize("revision", [None, "next"])
def test_a_base_is_not_lost(pushed: HubServer, lorun: LoRunModel, revision: str | None) -> None:
    before = pushed.files("alice/net")
    with pytest.raises(LoRunError, match="has a base.safetensors that these adapters may not fit"):
        lorun.push_to_hub("alice/net", adapters_only=True, revision=revision, token="alice-token")
    assert pushed.files("alice/net") == before and list(pushed.repos["alice/net"].branches) == ["main"]


def test_a_name_alone_is_in_one_s_own_namespace(hub: HubServer, lorun: LoRunModel) -> None:
    lorun.push_to_hub("net", token="alice-token")
    assert list(hub.repos) == ["alice/net"] and "base.safetensors" in hub.files("alice/net")


def test_a_stage_of_several_modules(hub: HubServer, tmp_path: Path) -> None:
    case = ZOO["pair_blocks"]()
    lorun = lorun_adapt.convert(case.net, rank=2)
    lorun.push_to_hub("alice/pairs", token="alice-token")
    expected = lorun(*case.inputs)
    for subfolder in (None, SET, f"{SET}/stage_01"):
        hub.forget()
        lorun.load_adapter("alice/pairs", "one", stage=1, subfolder=subfolder, cache_dir=tmp_path / str(subfolder))
        assert len(fetched(hub)) == 5 and all("stage_01" in name for name in fetched(hub) - {"lorun_config.json"})
        lorun.set_adapter({1: "one"})
        assert torch.equal(lorun(*case.inputs), expected)


# --- what goes wrong -----------------------------------------------------------------------------


def unchanged(lorun: LoRunModel, blocks: Case, message: str, source: str = "alice/net", **options: object) -> None:
    """Loading fails with a message, and what ran runs on."""
    before, names = lorun(*blocks.inputs), lorun.adapter_names
    with pytest.raises(LoRunError, match=message):
        lorun.load_adapter(source, "default", **options)
    assert torch.equal(lorun(*blocks.inputs), before) and lorun.adapter_names == names


def alike(lorun: LoRunModel, name: str, other: str) -> bool:
    """Whether two sets hold the same tensors."""
    a, b = (lorun.adapters[each].state_dict() for each in (name, other))
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_who_may(pushed: HubServer, lorun: LoRunModel, blocks: Case) -> None:
    pushed.repos["alice/net"].private = True
    unchanged(lorun, blocks, "no repository alice/net, or it is private")
    unchanged(lorun, blocks, "no repository alice/net, or it is private", token="bob-token")
    unchanged(lorun, blocks, "the request to the Hub for alice/net failed .*401", token="no-such-token")
    lorun.load_adapter("alice/net", "mine", token="alice-token")
    pushed.repos["alice/net"].private = False
    pushed.repos["alice/net"].gated = True
    unchanged(lorun, blocks, "grant it on request", token="bob-token", cache_dir="elsewhere")
    unchanged(lorun, blocks, "no repository nobody/net, or it is private", source="nobody/net")
    with pytest.raises(LoRunError, match="failed .*don't have the rights to write"):
        lorun.push_to_hub("alice/net", token="bob-token")


def test_files_that_are_missing(pushed: HubServer, lorun: LoRunModel, blocks: Case) -> None:
    pushed.add_commit("alice/net", {}, delete=[f"{SET}/stage_02/adapter_model.safetensors"])
    unchanged(lorun, blocks, "no adapters/default/stage_02/adapter_model.safetensors in alice/net: ")
    lorun.load_adapter("alice/net", "one", stage=1)
    pushed.add_repo("alice/empty", {"README.md": b"# nothing"})
    unchanged(lorun, blocks, "its stage with stage=", source="alice/empty")
    with pytest.raises(LoRunError, match="a repository without lorun_config.json"):
        lorun_adapt.from_pretrained("alice/empty", blocks.net)


def test_what_the_hub_or_its_client_does_not_take(hub: HubServer, lorun: LoRunModel, blocks: Case, monkeypatch) -> None:
    unchanged(lorun, blocks, "the Hub refuses a value for alice/net|expected a repository", subfolder="..\\x")
    unchanged(lorun, blocks, "the Hub refuses a value for alice/net .*codec", token="alïce")

    def refuse(self, request):
        return hub_server.Reply(400, {"errors": [{"message": '"license" must be one of'}, {"message": "or other"}]})

    known = [(method, pattern, f) for method, pattern, f in ROUTES if "validate-yaml" not in pattern.pattern]
    pattern = next(pattern for _, pattern, _ in ROUTES if "validate-yaml" in pattern.pattern)
    monkeypatch.setattr(hub_server, "ROUTES", [*known, ("POST", pattern, refuse)])
    with pytest.raises(
        LoRunError,
        match='the Hub refuses .*"license" must be one of.*or other.: correct this argument, or this field of the card',
    ) as caught:
        lorun.push_to_hub("alice/net", token="alice-token")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("commit_fails", [True, False])
def test_an_upload_that_fails_leaves_no_empty_repository(
    hub: HubServer, lorun: LoRunModel, monkeypatch, commit_fails: bool
) -> None:
    def refuse(self, request, **parts):
        raise hub_server.HubError(403, None, "Your storage is full")

    part = "/commit/" if commit_fails else "/preupload/"
    routes = [(method, p, refuse if part in p.pattern else f) for method, p, f in ROUTES]
    monkeypatch.setattr(hub_server, "ROUTES", routes)
    with pytest.raises(LoRunError, match="Your storage is full|403"):
        lorun.push_to_hub("alice/new", token="alice-token")
    assert "alice/new" not in hub.repos
    hub.add_repo("alice/net", {"README.md": b"mine"})
    with pytest.raises(LoRunError, match="Your storage is full|403"):
        lorun.push_to_hub("alice/net", token="alice-token")
    assert hub.files("alice/net") == {"README.md": b"mine"}  # what was there before stays


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.ENOTDIR])
def test_an_error_of_the_disk_is_not_the_hubs(
    pushed: HubServer, lorun: LoRunModel, blocks: Case, monkeypatch, number: int
) -> None:
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number), "/cache/models")

    monkeypatch.setattr("lorun_adapt.hub.repository.hf_hub_download", fail)
    unchanged(lorun, blocks, rf"alice/net on this disk \(.*{os.strerror(number)}.*free some space")


def test_a_refusal_is_not_taken_for_a_lost_connection(
    pushed: HubServer, lorun: LoRunModel, blocks: Case, monkeypatch
) -> None:
    def refuse(self, request, repo, revision, file):
        raise hub_server.HubError(403, None, "Your token may not read this")

    routes = [(method, p, refuse if f is HubServer._resolve else f) for method, p, f in ROUTES]
    monkeypatch.setattr(hub_server, "ROUTES", routes)
    unchanged(lorun, blocks, "403")


def test_peft_s_adapter_from_the_cache_without_a_connection(
    hub: HubServer, lorun: LoRunModel, blocks: Case, tmp_path: Path, monkeypatch
) -> None:
    files = files_of_stage_2(lorun, tmp_path / "saved")
    hub.add_repo("bob/stage", files)
    lorun.load_adapter("bob/stage", "bob", stage=2)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault("*", "error", method="*")
    lorun.load_adapter("bob/stage", "bob_again", stage=2)
    assert alike(lorun, "bob_again", "bob")


@pytest.mark.parametrize("kind", ["drop", "short", "damage", "error"])
def test_a_connection_that_fails(pushed: HubServer, lorun: LoRunModel, blocks: Case, kind: str, monkeypatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits longer each time
    path = f"{SET}/stage_02/adapter_model.safetensors"
    pushed.fault(path, kind)
    unchanged(
        lorun, blocks, "has the wrong hash" if kind == "damage" else "request to the Hub for alice/net failed", stage=2
    )
    pushed.forget()
    lorun.load_adapter("alice/net", "theirs", stage=2)  # what the cache holds damaged is fetched anew
    assert path in fetched(pushed)


def test_damage_in_the_cache_is_mended(pushed: HubServer, lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    lorun.load_adapter("alice/net", "theirs", stage=2, cache_dir=tmp_path / "cache")
    (held,) = (tmp_path / "cache").rglob("adapter_model.safetensors")
    blob = held.resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 0xFF
    blob.write_bytes(data)
    unchanged(lorun, blocks, "has the wrong hash", stage=2, cache_dir=tmp_path / "cache", local_files_only=True)
    lorun.load_adapter("alice/net", "again", stage=2, cache_dir=tmp_path / "cache")
    assert alike(lorun, "again", "theirs")


def test_damage_in_a_cache_without_links_is_mended(
    pushed: HubServer, lorun: LoRunModel, blocks: Case, tmp_path: Path, monkeypatch
) -> None:
    from huggingface_hub import file_download

    monkeypatch.setattr(file_download, "are_symlinks_supported", lambda *_: False)
    lorun.load_adapter("alice/net", "theirs", stage=2, cache_dir=tmp_path / "cache")
    (held,) = (tmp_path / "cache").rglob("adapter_model.safetensors")
    assert not held.is_symlink()
    held.write_bytes(held.read_bytes()[:-1] + b"x")
    lorun.load_adapter("alice/net", "again", stage=2, cache_dir=tmp_path / "cache")


def test_files_in_xet_storage(pushed: HubServer, lorun: LoRunModel, blocks: Case, tmp_path: Path, monkeypatch) -> None:
    """Which the client keeps once for all repositories, with links from each."""
    from huggingface_hub import file_download

    def xet_get(*, incomplete_path: Path, xet_file_data, **_: object) -> None:
        stored = [file for repo in pushed.repos.values() for file in repo.find("main").files.values()]
        incomplete_path.write_bytes(next(s.data for s in stored if s.xet_hash == xet_file_data.file_hash))

    files = files_of_stage_2(lorun, tmp_path / "saved")
    pushed.add_repo("bob/stage", files)
    pushed.xet = True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False, raising=False)
    monkeypatch.setattr(file_download, "xet_get", xet_get, raising=False)
    expected, cache = lorun(*blocks.inputs), tmp_path / "cache"
    for _ in range(2):
        loaded = lorun_adapt.from_pretrained("alice/net", blocks.net, cache_dir=cache)
        assert torch.equal(loaded(*blocks.inputs), expected)
        loaded.load_adapter("alice/net", "theirs", stage=2, cache_dir=cache)
        loaded.load_adapter("bob/stage", "bob", stage=2, cache_dir=cache)
        (held, *_) = cache.rglob("stage_02/adapter_model.safetensors")
        blob = held.resolve()
        assert (blob.parents[1] == cache / "blobs") == hasattr(file_download, "shared_blobs_enabled")
        blob.chmod(0o600)
        blob.write_bytes(blob.read_bytes()[:-1] + b"x")  # and once more, with damage


@pytest.mark.parametrize("name", ["../../../../outside", "../../../../../../outside"])
def test_other_links_out_of_a_cache_are_not_followed(
    pushed: HubServer, lorun: LoRunModel, blocks: Case, tmp_path: Path, name: str
) -> None:
    lorun.load_adapter("alice/net", "theirs", stage=2, cache_dir=tmp_path / "cache")
    (held,) = (tmp_path / "cache").rglob("adapter_model.safetensors")
    content = held.read_bytes()
    held.unlink()
    held.symlink_to(name)
    (held.parent / name).resolve().write_bytes(content)
    unchanged(lorun, blocks, "leads out of", stage=2, cache_dir=tmp_path / "cache", local_files_only=True)


def test_a_damaged_description_is_mended(pushed: HubServer, lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    lorun.load_adapter("alice/net", "theirs", cache_dir=tmp_path / "cache")
    (held,) = (tmp_path / "cache").rglob("lorun_config.json")
    held.resolve().write_bytes(held.read_bytes().replace(b"fingerprint", b"fingerprinT"))
    unchanged(lorun, blocks, "has the wrong hash", cache_dir=tmp_path / "cache", local_files_only=True)
    lorun.load_adapter("alice/net", "again", cache_dir=tmp_path / "cache")
    assert alike(lorun, "again", "default")


def test_nothing_is_taken_without_its_description(
    pushed: HubServer, lorun: LoRunModel, blocks: Case, monkeypatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    pushed.fault("lorun_config.json", "error", method="*")
    unchanged(lorun, blocks, "cannot reach the Hub", stage=2, subfolder=f"{SET}/stage_02")
    assert not pushed.downloads


def test_what_is_pulled_replaces_what_was_pulled(pushed: HubServer, lorun: LoRunModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pull(Repository("alice/net"), out)
    (out / "notes.txt").write_text("mine")
    shutil.copytree(out / SET, out / "adapters/mine")
    pull(Repository("alice/net"), out)
    assert (out / "notes.txt").read_text() == "mine" and (out / "adapters/mine/stage_02").is_dir()
    with pytest.raises(LoRunError, match="would delete its base.safetensors"):
        lorun.save_pretrained(out, adapters_only=True)
    assert (out / "base.safetensors").exists()


@pytest.mark.parametrize("card", ["README.md", f"{SET}/README.md"])
def test_an_edited_card_is_pulled_and_pushed(card: str, pushed: HubServer, tmp_path: Path) -> None:
    pushed.add_commit("alice/net", {card: CARD})
    pull(Repository("alice/net"), tmp_path / "out")
    assert (tmp_path / "out" / card).read_bytes() == CARD
    (tmp_path / "out" / card).write_bytes(b"---\nlicense: mit\n---\nedited here")
    push(tmp_path / "out", "alice/other", token="alice-token")
    assert pushed.files("alice/other")[card].endswith(b"edited here")
    push(tmp_path / "out", "alice/net", token="alice-token")
    assert pushed.files("alice/net")[card].endswith(b"edited here")


def test_a_card_that_was_edited_on_the_hub_is_kept(pushed: HubServer, lorun: LoRunModel) -> None:
    written = pushed.files("alice/net")["README.md"]
    pushed.add_commit("alice/net", {"README.md": CARD})
    lorun.copy_adapter("default", "more")
    for _ in range(2):
        with pytest.warns(UserWarning, match="README.md of alice/net was edited there, so it is kept"):
            lorun.push_to_hub("alice/net", token="alice-token")
    files = pushed.files("alice/net")
    assert files["README.md"] == CARD and "adapters/more/README.md" in files
    lorun.delete_adapter("more")
    pushed.add_commit("alice/net", {"README.md": written})
    lorun.copy_adapter("default", "more")
    with pytest.warns(UserWarning, match="was edited there"):  # the card of an earlier state
        lorun.push_to_hub("alice/net", token="alice-token")


def test_adapters_alone_do_not_replace_a_conversion(
    pushed: HubServer, lorun: LoRunModel, tmp_path: Path, capsys, monkeypatch
) -> None:
    lorun.push_to_hub("alice/adapters", adapters_only=True, token="alice-token")
    lorun.save_pretrained(tmp_path / "out")
    code, text = command(capsys, monkeypatch, "pull", "alice/adapters", "--out", tmp_path / "out")
    assert code == 2 and "would delete its base.safetensors" in text and (tmp_path / "out/base.safetensors").exists()


def test_a_hostile_list(pushed: HubServer, capsys, monkeypatch) -> None:
    described = json.loads(pushed.files("alice/net")["lorun_config.json"])
    described.pop("sha256")
    described["network"] = "[/red]\x1b[2J"
    config = json.loads(pushed.files("alice/net")[f"{SET}/stage_00/adapter_config.json"]) | {
        "r": [],
        "rank_pattern": {"a": {}},
    }
    name, content = f"{SET}/stage_00/adapter_config.json", json.dumps(config).encode()
    described["files"][name] = hashlib.sha256(content).hexdigest()
    pushed.add_commit("alice/net", {name: content, "lorun_config.json": as_text(described).encode()})
    code, text = command(capsys, monkeypatch, "list", "alice/net")
    assert code == 0 and "[/red] [2J, with its base" in text and "\x1b" not in text


def test_without_a_connection(pushed: HubServer, lorun: LoRunModel, blocks: Case, monkeypatch) -> None:
    unchanged(lorun, blocks, "cannot reach the Hub, and alice/net is not in the cache", local_files_only=True)
    lorun.load_adapter("alice/net", "theirs")
    pushed.forget()
    lorun.load_adapter("alice/net", "again", local_files_only=True)
    assert not pushed.requests
    forget_sessions = getattr(utils, "reset_sessions", lambda: None)  # before version 1 they remember what was set
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    forget_sessions()
    try:
        lorun.load_adapter("alice/net", "offline")
        with pytest.raises(LoRunError, match="cannot reach the Hub, and alice/net is not in the cache"):
            lorun_adapt.from_pretrained("alice/net", blocks.net)  # of which the base was never needed
    finally:
        monkeypatch.undo()
        forget_sessions()
    assert not pushed.requests


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "adapters/default/stage_02/evil.py", "adapters/../evil"])
def test_names_stay_inside(pushed: HubServer, lorun: LoRunModel, blocks: Case, name: str, tmp_path: Path) -> None:
    described = json.loads(pushed.files("alice/net")["lorun_config.json"])
    described.pop("sha256")
    described["files"][name] = "0" * 64
    pushed.add_repo("bob/evil", {**pushed.files("alice/net"), name: b"evil"})
    pushed.add_commit("bob/evil", {"lorun_config.json": as_text(described).encode()})
    with pytest.raises(LoRunError, match="invalid 'files'"):
        lorun_adapt.from_pretrained("bob/evil", blocks.net)
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"files": []}', b'{"files": {"a": 1}, "adapters": []}', b"\x80\x04."]
)
def test_a_description_that_is_none(hub: HubServer, lorun: LoRunModel, blocks: Case, content: bytes) -> None:
    hub.add_repo("alice/net", {"lorun_config.json": content})
    unchanged(lorun, blocks, "lorun_config.json of alice/net has the wrong hash")


def test_options_of_the_hub_are_not_for_folders(lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    lorun.save_pretrained(tmp_path / "saved")
    with pytest.raises(LoRunError, match="with revision and local_files_only, found"):
        lorun.load_adapter(tmp_path / "saved", "x", revision="main", local_files_only=True)
    with pytest.raises(LoRunError, match="a repository as 'user/name' with subfolder"):
        lorun_adapt.from_pretrained(str(tmp_path / "saved"), blocks.net, subfolder="adapters")


def test_a_folder_goes_before_a_repository(
    pushed: HubServer, lorun: LoRunModel, blocks: Case, monkeypatch, tmp_path
) -> None:
    monkeypatch.chdir(tmp_path)
    lorun.save_pretrained("alice/net")
    lorun_adapt.from_pretrained("alice/net", blocks.net)
    assert not pushed.requests
    shutil.rmtree("alice")
    lorun_adapt.from_pretrained("alice/net", blocks.net)
    assert pushed.requests


# --- a file by itself ----------------------------------------------------------------------------


def test_a_safetensors_file(lorun: LoRunModel, blocks: Case, tmp_path: Path) -> None:
    expected = lorun(*blocks.inputs)
    lorun.save_pretrained(tmp_path / "saved")
    stage = tmp_path / "saved" / SET / "stage_02"
    lorun.load_adapter(stage / "adapter_model.safetensors", "named")  # its folder says whose it is
    (tmp_path / "mine").mkdir()
    shutil.copy(stage / "adapter_config.json", tmp_path / "mine")
    shutil.copy(stage / "adapter_model.safetensors", tmp_path / "mine" / "best.safetensors")
    lorun.load_adapter(tmp_path / "mine" / "best.safetensors", "mine", stage=2)
    for name in ("named", "mine"):
        lorun.set_adapter({2: name})
        assert torch.equal(lorun(*blocks.inputs), expected)
    with pytest.raises(LoRunError, match="cannot tell which stage"):
        lorun.load_adapter(tmp_path / "mine" / "best.safetensors", "whose")
    (tmp_path / "mine" / "adapter_config.json").unlink()
    with pytest.raises(LoRunError, match="adapter_config.json"):
        lorun.load_adapter(tmp_path / "mine" / "best.safetensors", "mine", stage=2)

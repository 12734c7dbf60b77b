"""The real Hub client against the server that stands in for the Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from huggingface_hub import CommitOperationDelete, HfApi, constants, file_download, hf_hub_download, snapshot_download
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

LARGE = bytes(range(256)) * 300
CARD = b"---\ntags:\n- unfolding\n- lorun\nlibrary_name: lorun\nlicense: mit\n---\n# A net\n"


@pytest.fixture
def alice(hub: HubServer) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token="alice-token")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "net"
    (folder / "task").mkdir(parents=True)
    (folder / "README.md").write_bytes(CARD)
    (folder / "task" / "a b.json").write_bytes(b"{}")
    (folder / "model.safetensors").write_bytes(LARGE)
    return folder


def fetch(hub: HubServer, name: str, cache: Path, **more: Any) -> bytes:
    more = {"token": False, **more}
    return Path(hf_hub_download("alice/net", name, endpoint=hub.endpoint, cache_dir=cache, **more)).read_bytes()


def test_a_folder_comes_back_as_it_was_uploaded(hub: HubServer, alice: HfApi, folder: Path, tmp_path: Path) -> None:
    alice.create_repo("alice/net")
    info = alice.upload_folder(repo_id="alice/net", folder_path=folder, commit_message="first")

    assert info.oid == hub.commits("alice/net")[0]
    assert hub.files("alice/net") == {
        ".gitattributes": hub.files("alice/net")[".gitattributes"],
        "README.md": CARD,
        "task/a b.json": b"{}",
        "model.safetensors": LARGE,
    }
    assert [path for path, stored in hub.repos["alice/net"].find("main").files.items() if stored.lfs] == [
        "model.safetensors"
    ]
    assert sum(method == "PUT" for method, _ in hub.requests) == 1

    local = snapshot_download("alice/net", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False)

    assert {str(x.relative_to(local)): x.read_bytes() for x in Path(local).rglob("*") if x.is_file()} == hub.files(
        "alice/net"
    )
    again = alice.upload_folder(repo_id="alice/net", folder_path=folder)
    assert again.oid == info.oid and sum(method == "PUT" for method, _ in hub.requests) == 1


def test_only_the_files_asked_for_are_sent(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("alice/net", {"a/x.json": b"{}", "a/x.safetensors": LARGE, "b/x.safetensors": LARGE[::-1]})

    local = snapshot_download(
        "alice/net", allow_patterns=["a/*"], endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False
    )

    assert sorted(hub.downloads) == ["a/x.json", "a/x.safetensors"]
    assert (Path(local) / "a" / "x.safetensors").read_bytes() == LARGE
    assert not (Path(local) / "b").exists()
    hub.forget()
    assert fetch(hub, "a/x.json", tmp_path / "cache") == b"{}" and hub.downloads == []
    assert [method for method, path in hub.requests] == ["HEAD"]


def test_branches_tags_and_commits_are_revisions(hub: HubServer, alice: HfApi, tmp_path: Path) -> None:
    first = hub.add_repo("alice/net", {"a.json": b"1", "model.safetensors": LARGE})
    alice.create_tag("alice/net", tag="v1")
    alice.create_branch("alice/net", branch="more/stages")
    alice.create_branch("alice/net", branch="more/stages", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        alice.create_branch("alice/net", branch="more/stages")
    alice.upload_file(path_or_fileobj=b"2", path_in_repo="a.json", repo_id="alice/net", revision="more/stages")
    hub.add_commit("alice/net", {"a.json": b"3"})

    cache = tmp_path / "cache"
    found = {x: fetch(hub, "a.json", cache, revision=x) for x in ("main", "more/stages", "v1", first)}

    assert found == {"main": b"3", "more/stages": b"2", "v1": b"1", first: b"1"}
    assert hub.files("alice/net", "more/stages")["model.safetensors"] == LARGE
    refs = alice.list_repo_refs("alice/net")
    assert [x.name for x in refs.branches] == ["main", "more/stages"] and [x.name for x in refs.tags] == ["v1"]


def test_a_commit_may_delete(hub: HubServer, alice: HfApi) -> None:
    head = hub.add_repo("alice/net", {"a.json": b"1", "b/c.json": b"1", "b/d/e.json": b"1"})
    gone = [CommitOperationDelete("b/")]
    alice.create_commit("alice/net", gone, commit_message="less", parent_commit=head)
    assert hub.files("alice/net") == {"a.json": b"1"}
    with pytest.raises(HfHubHTTPError, match="A commit has happened"):
        alice.create_commit("alice/net", [CommitOperationDelete("a.json")], commit_message="x", parent_commit=head)
    with pytest.raises(EntryNotFoundError, match="doesn't exist"):
        alice.delete_file("z.json", "alice/net")
    with pytest.raises(HfHubHTTPError, match="no pull requests"):
        alice.create_commit("alice/net", [CommitOperationDelete("a.json")], commit_message="x", create_pr=True)


def test_creating_a_repository_twice(hub: HubServer, alice: HfApi) -> None:
    url = alice.create_repo("net", private=True)
    assert url.repo_id == "alice/net" and hub.repos["alice/net"].private
    assert alice.create_repo("alice/net", exist_ok=True).repo_id == "alice/net"
    with pytest.raises(HfHubHTTPError, match="already created"):
        alice.create_repo("alice/net")
    with pytest.raises(HfHubHTTPError, match="rights"):
        alice.create_repo("bob/net")
    with pytest.raises(HfHubHTTPError):
        HfApi(endpoint=hub.endpoint, token=False).create_repo("alice/other")


def test_private_and_gated_repositories(hub: HubServer, alice: HfApi, tmp_path: Path) -> None:
    hub.add_repo("alice/net", {"a.json": b"1", "model.safetensors": LARGE}, private=True)
    for token in (False, "bob-token"):
        with pytest.raises(RepositoryNotFoundError):
            fetch(hub, "a.json", tmp_path / "cache", token=token)
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=hub.endpoint, token=token).list_repo_files("alice/net")
        with pytest.raises(RepositoryNotFoundError):
            snapshot_download("alice/net", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=token)
    with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
        fetch(hub, "a.json", tmp_path / "cache", token="wrong")
    # The storage refuses requests that have a token: the client keeps it from other origins.
    assert fetch(hub, "model.safetensors", tmp_path / "cache", token="alice-token") == LARGE

    hub.add_repo("alice/net", {"a.json": b"1"}, gated=True)
    for token in (False, "bob-token"):
        assert HfApi(endpoint=hub.endpoint, token=token).list_repo_files("alice/net") == ["a.json"]
        with pytest.raises(GatedRepoError):
            fetch(hub, "a.json", tmp_path / "gated", token=token)
    hub.repos["alice/net"].members.add("bob")
    assert fetch(hub, "a.json", tmp_path / "gated", token="bob-token") == b"1"


def test_what_does_not_exist(hub: HubServer, alice: HfApi, tmp_path: Path) -> None:
    hub.add_repo("alice/net", {"a.json": b"1"})
    with pytest.raises(EntryNotFoundError):
        fetch(hub, "b.json", tmp_path / "cache")
    with pytest.raises(RevisionNotFoundError):
        fetch(hub, "a.json", tmp_path / "cache", revision="v9")
    with pytest.raises(RevisionNotFoundError):
        snapshot_download("alice/net", revision="v9", endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=False)
    for token in (False, "alice-token"):
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=hub.endpoint, token=token).model_info("alice/none")
        with pytest.raises(RepositoryNotFoundError):
            HfApi(endpoint=hub.endpoint, token=token).upload_file(
                path_or_fileobj=b"1", path_in_repo="a", repo_id="alice/none"
            )
    with pytest.raises(HfHubHTTPError, match="rights"):
        HfApi(endpoint=hub.endpoint, token="bob-token").upload_file(
            path_or_fileobj=b"1", path_in_repo="a", repo_id="alice/net"
        )


def test_listings(hub: HubServer, alice: HfApi) -> None:
    hub.add_repo("alice/net", {"README.md": CARD, "a/b/x.safetensors": LARGE, "a/c.json": b"{}"}, tags=["mine"])
    hub.add_repo("alice/hidden", {}, private=True, tags=["mine"])
    hub.add_repo("bob/other")
    public = HfApi(endpoint=hub.endpoint, token=False)

    assert alice.whoami()["name"] == "alice"
    assert public.list_repo_files("alice/net") == ["README.md", "a/b/x.safetensors", "a/c.json"]
    info = public.model_info("alice/net", files_metadata=True)
    assert info.sha == hub.commits("alice/net")[0] and not info.private
    assert info.tags == ["mine", "unfolding", "lorun", "lorun", "license:mit"]
    assert {x.rfilename: x.size for x in info.siblings} == {
        "README.md": len(CARD),
        "a/b/x.safetensors": len(LARGE),
        "a/c.json": 2,
    }
    assert [x.id for x in public.list_models(author="alice")] == ["alice/net"]
    assert [x.id for x in alice.list_models(author="alice")] == ["alice/net", "alice/hidden"]
    assert [x.id for x in public.list_models(filter=["mine", "lorun"])] == ["alice/net"]
    assert [x.id for x in public.list_models(search="OTHER")] == ["bob/other"]
    assert [x.path for x in public.list_repo_tree("alice/net", recursive=True)] == [
        "README.md",
        "a",
        "a/b",
        "a/b/x.safetensors",
        "a/c.json",
    ]
    assert [x.path for x in public.list_repo_tree("alice/net", "a", expand=True)] == ["a/b", "a/c.json"]
    (large,) = public.get_paths_info("alice/net", ["a/b/x.safetensors", "none"])
    assert large.lfs is not None and large.lfs.size == len(LARGE)
    assert public.file_exists("alice/net", "a/c.json") and not public.file_exists("alice/net", "none")


def test_a_card_without_metadata_is_a_warning(hub: HubServer, alice: HfApi) -> None:
    hub.add_repo("alice/net")
    for text, refused in ((b"# A net", pytest.warns(UserWarning)), (b"---\nx: 1", pytest.raises(ValueError))):
        with refused:
            alice.upload_file(path_or_fileobj=text, path_in_repo="README.md", repo_id="alice/net")


def test_a_commit_cannot_name_what_was_not_uploaded(hub: HubServer) -> None:
    head = hub.add_repo("alice/net", {"a.json": b"1"})
    for value in (
        {"path": "m.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 3},
        {"path": "../m.safetensors", "algo": "sha256", "oid": "0" * 64, "size": 3},
    ):
        lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "lfsFile", "value": value}]
        body = "\n".join(json.dumps(line) for line in lines).encode()
        request = urllib.request.Request(f"{hub.endpoint}/api/models/alice/net/commit/main", body)
        request.add_header("Authorization", "Bearer alice-token")
        with pytest.raises(urllib.error.HTTPError, match="400") as caught:
            urllib.request.urlopen(request)
        caught.value.close()
    assert hub.commits("alice/net") == [head]


def test_the_storage_refuses_damaged_content(hub: HubServer) -> None:
    hub.add_repo("alice/net")
    request = urllib.request.Request(f"{hub.storage}/lfs/alice/net/{'0' * 64}", b"other", method="PUT")
    with pytest.raises(urllib.error.HTTPError, match="400") as caught:
        urllib.request.urlopen(request)
    caught.value.close()
    assert not hub.repos["alice/net"].objects


def test_an_upload_through_errors(hub: HubServer, alice: HfApi, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    head = hub.add_repo("alice/net")
    hub.fault("/lfs/*", "error", method="PUT", times=1)  # the client tries again
    hub.fault("/api/models/alice/net/commit/main", "drop", method="POST", times=1)  # the answer comes too late
    with pytest.raises((OSError, *HfHubHTTPError.__bases__)):
        alice.upload_file(
            path_or_fileobj=folder / "model.safetensors", path_in_repo="model.safetensors", repo_id="alice/net"
        )
    assert [method for method, path in hub.requests if path.startswith("/lfs/")] == ["PUT", "PUT"]
    assert hub.files("alice/net") == {"model.safetensors": LARGE} and hub.commits("alice/net")[1:] == [head]


def test_a_dropped_connection(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.add_repo("alice/net", {"model.safetensors": LARGE})
    hub.fault("model.safetensors", "drop", times=1)
    try:
        content = fetch(hub, "model.safetensors", tmp_path / "cache")
    except OSError as error:  # clients before 1.0 leave it to the next call
        assert type(error).__name__ == "ChunkedEncodingError"
        content = fetch(hub, "model.safetensors", tmp_path / "cache")
    assert content == LARGE and hub.downloads == ["model.safetensors"] * 2
    assert len(hub.ranges) == 1 and 0 < int(hub.ranges[0][6:-1]) <= len(LARGE) // 2


def test_a_server_that_drops_all_connections(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.add_repo("alice/net", {"model.safetensors": LARGE})
    hub.fault("*.safetensors", "drop")
    # In new clients the errors of connections are no OSError, and their package's name has changed before.
    with pytest.raises((OSError, *HfHubHTTPError.__bases__)) as caught:
        fetch(hub, "model.safetensors", tmp_path / "cache")
    assert type(caught.value).__name__ in ("ChunkedEncodingError", "RemoteProtocolError")
    assert not list(tmp_path.glob("cache/*/snapshots/*/*"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_shorter_file_is_noticed_and_a_damaged_one_is_not(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.add_repo("alice/net", {name: LARGE})
    hub.fault(name, "short", times=1)
    with pytest.raises(OSError, match="Consistency check"):
        fetch(hub, name, tmp_path / "short")
    hub.fault(name, "damage", times=1)
    damaged = fetch(hub, name, tmp_path / "damaged")
    assert damaged[:-8] == LARGE[:-8] and len(damaged) == len(LARGE) and damaged != LARGE
    hub.fault(name, "wrong-etag")
    assert fetch(hub, name, tmp_path / "etag") == LARGE
    assert all(
        blob.name != hub.repos["alice/net"].find("main").files[name].etag for blob in tmp_path.glob("etag/*/blobs/*")
    )


def test_an_error_of_the_server(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
    hub.add_repo("alice/net", {"model.safetensors": LARGE})
    hub.fault("model.safetensors", "error", times=1)
    with pytest.raises(HfHubHTTPError, match="500"):
        fetch(hub, "model.safetensors", tmp_path / "cache")
    hub.fault("model.safetensors", "error", method="HEAD")
    with pytest.raises(LocalEntryNotFoundError):
        fetch(hub, "model.safetensors", tmp_path / "cache")
    with pytest.raises(ValueError, match="unknown fault"):
        hub.fault("a", "none")


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil"])
def test_a_repository_that_reaches_out_of_its_folder(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.add_repo("alice/net", {"a.json": b"1", name: b"evil"})
    target = {"endpoint": hub.endpoint, "token": False, "local_dir": tmp_path / "around" / "local"}
    try:
        snapshot_download("alice/net", **target)
    except ValueError as error:
        assert "Invalid filename" in str(error) and not list(tmp_path.rglob("evil"))
    else:  # old clients write where they are told to
        reached = tmp_path / "around" / ("evil" if ".." in name else "local/evil")
        assert not hasattr(file_download, "_validate_relative_filename") and reached.read_bytes() == b"evil"


def test_another_process(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("alice/net", {"a.json": b"1"})
    program = (
        "import huggingface_hub as h; print(h.list_repo_files('alice/net'), h.hf_hub_download('alice/net', 'a.json'))"
    )
    environment = {**os.environ, **hub.environment(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("['a.json'] " + str(tmp_path))

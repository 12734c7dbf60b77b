"""What the Hub of :mod:`hub_server` holds: repositories, their commits, and how listings show them."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, NamedTuple

DATE = "2024-05-01T00:00:00.000Z"
LARGEST_REGULAR = 10 << 20


class Reply(NamedTuple):
    status: int
    body: Any = b""  # bytes, or what is sent as JSON
    headers: Mapping[str, str] = {}
    is_file: bool = False


class HubError(Exception):
    """An answer that the client turns into an exception."""

    def __init__(self, status: int, code: str | None, message: str, **headers: str) -> None:
        super().__init__(message)
        named = {"X-Error-Code": code} if code else {}
        self.reply = Reply(status, {"error": message}, {**named, "X-Error-Message": message, **headers})


class Stored(NamedTuple):
    """A file of a commit."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def xet_hash(self) -> str:
        return hashlib.sha256(b"xet" + self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git itself holds in place of a large file."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def blob(self) -> str:
        blob = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob


class Commit(NamedTuple):
    id: str
    files: dict[str, Stored]
    parent: Commit | None


@dataclass
class Repo:
    id: str
    private: bool
    gated: bool
    lfs: tuple[str, ...]
    tags: tuple[str, ...]
    members: set[str]  # who may read all of it, and write
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, Commit] = field(default_factory=dict)
    versions: dict[str, Commit] = field(default_factory=dict)  # the git tags
    objects: dict[str, bytes] = field(default_factory=dict)  # LFS contents by sha256

    def find(self, revision: str) -> Commit:
        short = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        for known in (self.branches, self.versions, self.commits):
            if short in known:
                return known[short]
        for sha, commit in self.commits.items():
            if len(short) >= 7 and sha.startswith(short):
                return commit
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def is_large(self, path: str, size: int) -> bool:
        return size > LARGEST_REGULAR or any(fnmatchcase(path, pattern) for pattern in self.lfs)

    def commit(self, branch: str, files: dict[str, Stored]) -> Commit:
        blobs = sorted((path, stored.blob) for path, stored in files.items())
        sha = hashlib.sha1(repr((self.id, len(self.commits), blobs)).encode()).hexdigest()
        self.commits[sha] = self.branches[branch] = commit = Commit(sha, files, self.branches.get(branch))
        self.objects.update((stored.sha256, stored.data) for stored in files.values() if stored.lfs)
        return commit


def history(commit: Commit | None) -> Iterator[Commit]:
    while commit is not None:
        yield commit
        commit = commit.parent


def large(repo: Repo, value: dict[str, Any]) -> bytes:
    """The uploaded content that a client names."""
    content = repo.objects.get(value["oid"])
    if content is None or len(content) != value.get("size", len(content)):
        raise HubError(400, None, f"LFS object {value['oid']} does not exist")
    return content


def change(repo: Repo, files: dict[str, Stored], key: str, value: dict[str, Any]) -> None:
    """Apply one line of a commit."""
    path = value["path"]
    if {"..", "/"} & {*PurePosixPath(path).parts}:
        raise HubError(400, None, f"Invalid path: {path}")
    if key == "file":
        files[path] = Stored(base64.b64decode(value["content"], validate=True))
    elif key == "lfsFile":
        files[path] = Stored(large(repo, value), lfs=True)
    else:
        inside = path.rstrip("/") + "/"
        gone = [x for x in files if x == path or (key == "deletedFolder" and x.startswith(inside))]
        if not gone:
            raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {path} ({key})")
        for name in gone:
            del files[name]


def create_ref(refs: dict[str, Commit], name: str, commit: Commit) -> dict[str, bool]:
    if name in refs:
        raise HubError(409, None, f"Reference {name} already exists")
    refs[name] = commit
    return {"success": True}


def folders(commit: Commit) -> set[str]:
    return {str(above) for path in commit.files for above in PurePosixPath(path).parents} - {".", "/"}


def entry(commit: Commit, path: str) -> dict[str, Any]:
    """A file or a folder, as listings show it."""
    stored = commit.files.get(path)
    if stored is None:
        return {"type": "directory", "path": path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
    size = len(stored.data)
    lfs = {"lfs": {"oid": stored.sha256, "size": size, "pointerSize": len(stored.pointer)}} if stored.lfs else {}
    return {"type": "file", "path": path, "size": size, "oid": stored.blob, **lfs}


def info(repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
    for sibling in siblings if blobs else []:
        shown = entry(commit, sibling["rfilename"])
        sibling |= {"size": shown["size"], "blobId": shown["oid"]}
        if "lfs" in shown:
            sibling["lfs"] = {**shown["lfs"], "sha256": shown["lfs"]["oid"]}
    told = tags_of(commit.files["README.md"].data.decode()) if "README.md" in commit.files else {}
    library, licences = told.get("library_name", [])[:1], [f"license:{name}" for name in told.get("license", [])]
    return {
        **{"id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0], "sha": commit.id},
        **{"private": repo.private, "gated": "auto" if repo.gated else False, "disabled": False},
        **{"tags": [*repo.tags, *told.get("tags", []), *library, *licences], "library_name": (library or [None])[0]},
        **{"lastModified": DATE, "createdAt": DATE, "downloads": 0, "likes": 0, "siblings": siblings},
    }


def tags_of(readme: str) -> dict[str, list[str]]:
    """The metadata of a model card, as far as a model's tags need it: words, and lists of words."""
    found: dict[str, list[str]] = {}
    key = ""
    parts = readme.split("---\n")
    for line in parts[1].splitlines() if len(parts) > 2 and not parts[0] else []:
        if pair := re.fullmatch(r"(\w+):(.*)", line):
            key = pair[1]
            found[key] = [word for word in re.split(r"[\[\],\s'\"]+", pair[2]) if word]
        elif item := re.fullmatch(r"\s*-\s+(\S+)\s*", line):
            found.setdefault(key, []).append(item[1].strip("'\""))
    return found

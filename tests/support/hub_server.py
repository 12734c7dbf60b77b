"""A small Hugging Face Hub in memory, on loopback, for tests with the real `huggingface_hub` client.

with HubServer() as hub:
    hub.tokens["alice-token"] = "alice"
    hub.add_repo("alice/net", {"config.json": b"{}", "model.safetensors": data})
    hf_hub_download("alice/net", "config.json", endpoint=hub.endpoint, cache_dir=...)
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.message import Message
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from hub_repos import Commit, HubError, Reply, Repo, Stored, change, create_ref, entry, folders, history, info, large

FAULTS = ("drop", "damage", "short", "error", "wrong-etag")


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: bytes
    user: str | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Fault:
    pattern: str
    kind: str
    times: int | None
    method: str


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Any]]] = []


def route(method: str, template: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register an answer; `{repo}` stands for two parts of the path, `{file}` and `{folder}` for the rest of it.

    The path is matched while it is still quoted, so that the slash of a branch's name is none of the path's.
    """
    kinds = {"repo": "[^/]+/[^/]+", "file": ".+", "folder": ".+"}
    pattern = re.sub(r"{(\w+)}", lambda m: f"(?P<{m[1]}>{kinds.get(m[1], '[^/]+')})", template.replace(".", r"\."))

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class HubServer:
    """The server, as a context manager; what it holds may be read and changed at any time."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, str] = {}  # token -> user
        self.requests: list[tuple[str, str]] = []
        self.downloads: list[str] = []  # files whose content was sent, also if a fault spoiled it
        self.ranges: list[str] = []  # the Range headers of these requests
        self.failures: list[str] = []  # tracebacks of the server's own mistakes
        self.xet = False  # whether it says that large files are in Xet storage, which it does not speak itself
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        # The storage is another origin, as on the real Hub: new clients follow redirects within the Hub's own
        # origin and would then miss the headers of the first answer.
        self._listeners = [_Listener(self, storage=False), _Listener(self, storage=True)]
        self.endpoint, self.storage = (f"http://127.0.0.1:{listener.server_port}" for listener in self._listeners)

    def __enter__(self) -> HubServer:
        self._threads = [threading.Thread(target=x.serve_forever, args=(0.02,)) for x in self._listeners]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        for listener, thread in zip(self._listeners, self._threads):
            listener.shutdown()
            thread.join()
            listener.server_close()
        if kind is None and self.failures:
            raise AssertionError("the server itself failed:\n" + "\n".join(self.failures))

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | None = None,
        *,
        private: bool = False,
        gated: bool = False,
        lfs: Sequence[str] = ("*.safetensors",),
        tags: Sequence[str] = (),
        members: Iterable[str] = (),
    ) -> str:
        """Add a repository with one commit, whose id is returned; its namespace and `members` may read and write."""
        repo = Repo(repo_id, private, gated, tuple(lfs), tuple(tags), {repo_id.split("/")[0], *members})
        repo.commit("main", {path: Stored(x, repo.is_large(path, len(x))) for path, x in (files or {}).items()})
        self.repos[repo_id] = repo
        return repo.find("main").id

    def add_commit(
        self, repo_id: str, files: Mapping[str, bytes], *, delete: Iterable[str] = (), branch: str = "main"
    ) -> str:
        """Change and delete files as somebody else would; the new commit's id."""
        repo, gone = self.repos[repo_id], set(delete)
        with self._lock:
            kept = {path: stored for path, stored in repo.branches[branch].files.items() if path not in gone}
            new = {path: Stored(data, repo.is_large(path, len(data))) for path, data in files.items()}
            return repo.commit(branch, {**kept, **new}).id

    def add_branch(self, repo_id: str, name: str, revision: str = "main") -> None:
        self.repos[repo_id].branches[name] = self.repos[repo_id].find(revision)

    def add_tag(self, repo_id: str, name: str, revision: str = "main") -> None:
        self.repos[repo_id].versions[name] = self.repos[repo_id].find(revision)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: stored.data for path, stored in self.repos[repo_id].find(revision).files.items()}

    def commits(self, repo_id: str, revision: str = "main") -> list[str]:
        """Ids, the newest first."""
        return [commit.id for commit in history(self.repos[repo_id].find(revision))]

    def fault(self, path: str, kind: str, *, times: int | None = None, method: str = "GET") -> None:
        """Spoil answers about a file (its path in the repository), or about a URL's path; patterns are allowed.

        "drop" closes the connection after half of the body, "short" declares and sends half of it, "damage" inverts
        its last bytes, "error" answers 500 and does nothing, "wrong-etag" names another hash (whatever the method).
        """
        if kind not in FAULTS:
            raise ValueError(f"unknown fault {kind!r}")
        self._faults.append(Fault(path, kind, times, "*" if kind == "wrong-etag" else method))

    def forget(self) -> None:
        """Empty the records and take the faults away."""
        for records in (self.requests, self.downloads, self.ranges, self._faults):
            records.clear()

    def environment(self, home: Path) -> dict[str, str]:
        """Variables with which another process talks to this server only, and without a token."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_TOKEN": "",
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            # With hf-xet, new clients send large files to Xet storage without asking the Hub whether it has one.
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def redirect_client(self, monkeypatch: Any, home: Path) -> None:
        """Do the same for this process, whose client has read its variables when it was imported."""
        from huggingface_hub import HfApi

        variables = self.environment(home)
        values: dict[str, Any] = {name: variables[name] for name in ("HF_HOME", "HF_HUB_CACHE", "HF_TOKEN_PATH")}
        values |= {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True}
        values |= {"ENDPOINT": self.endpoint}
        values |= {"HUGGINGFACE_CO_URL_TEMPLATE": self.endpoint + "/{repo_id}/resolve/{revision}/{filename}"}
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for module in [module for key, module in sys.modules.items() if key.split(".")[0] == "huggingface_hub"]:
            # Old clients copy some constants into other modules.
            for name in values.keys() & vars(module).keys():
                monkeypatch.setattr(module, name, values[name])
        # Functions such as huggingface_hub.list_repo_files are methods of one object, made on import.
        monkeypatch.setattr(sys.modules[HfApi.__module__].api, "endpoint", self.endpoint)

    # What the answers have in common

    def _answer(self, request: Request, storage: bool) -> tuple[Reply, str]:
        """The answer, and the name by which faults may mean it."""
        path = self._as_meant(request.path)
        name = unquote(path)
        self.requests.append((request.method, name))
        try:
            for method, pattern, function in ROUTES:
                match = pattern.fullmatch(path)
                if match and method == request.method.replace("HEAD", "GET"):
                    groups = {key: unquote(value) for key, value in match.groupdict().items()}
                    name = groups.get("file", name)
                    if self._spoiled(name, request.method, "error"):
                        raise HubError(500, None, "Internal Error")
                    request.user = self._user(request.headers.get("Authorization"), storage)
                    with self._lock:
                        reply = function(self, request, **groups)
                    return reply if isinstance(reply, Reply) else Reply(200, reply), name
            raise HubError(404, None, "Sorry, we can't find the page you are looking for.")
        except HubError as error:
            return error.reply, name
        except Exception:
            self.failures.append(traceback.format_exc())
            return Reply(500), name

    def _as_meant(self, path: str) -> str:
        """The path of a hostile file: the client's HTTP library has resolved the `..` of its name."""
        for repo in self.repos.values():
            for commit in repo.commits.values():
                for file in (file for file in commit.files if ".." in file):
                    meant = f"/{repo.id}/resolve/{commit.id}/{quote(file)}"
                    if posixpath.normpath(meant) == path:
                        return meant
        return path

    def _user(self, authorization: str | None, storage: bool) -> str | None:
        if authorization is None:
            return None
        if storage:  # its URLs are signed
            raise HubError(400, None, "Only one auth mechanism allowed")
        user = self.tokens.get(authorization.removeprefix("Bearer "))
        if user is None:
            raise HubError(401, None, "Invalid credentials in Authorization header")
        return user

    def _spoiled(self, name: str, method: str, *kinds: str) -> str | None:
        with self._lock:
            for fault in self._faults:
                named = fault.pattern == name or fnmatchcase(name, fault.pattern)
                if named and fault.kind in kinds and fault.method in ("*", method) and fault.times != 0:
                    fault.times = None if fault.times is None else fault.times - 1
                    return fault.kind
        return None

    def _repo(self, request: Request, repo_id: str, write: bool = False) -> Repo:
        repo = self.repos.get(repo_id)
        if repo is None or (request.user not in repo.members and (repo.private or (write and not request.user))):
            # Nobody learns whether a private repository exists. Writing without a token has the code, too: clients
            # would infer it from the status, but not if the URL is http.
            if request.user is None:
                raise HubError(401, "RepoNotFound", "Invalid username or password.")
            raise HubError(404, "RepoNotFound", "Repository not found")
        if write and request.user not in repo.members:
            raise HubError(403, None, f"You don't have the rights to write to {repo_id}")
        return repo

    # Reading

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Any:
        if request.user is None:
            raise HubError(401, None, "Invalid username or password.")
        access = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        return {"type": "user", "name": request.user, "fullname": request.user, "orgs": [], "auth": access}

    @route("GET", "/api/models")
    def _list_models(self, request: Request) -> Any:
        author, words = (request.query.get(key, [""])[0] for key in ("author", "search"))
        visible = [repo for repo in self.repos.values() if not repo.private or request.user in repo.members]
        infos = [info(repo, repo.find("main"), False) for repo in visible if words.lower() in repo.id.lower()]
        found = [info for info in infos if set(request.query.get("filter", [])) <= set(info["tags"])]
        found = [info for info in found if author in ("", info["author"])]
        return found[: int(request.query.get("limit", ["1000"])[0])]

    @route("GET", "/api/models/{repo}")
    @route("GET", "/api/models/{repo}/revision/{revision}")
    def _model(self, request: Request, repo: str, revision: str = "main") -> Any:
        found = self._repo(request, repo)
        return info(found, found.find(revision), request.flag("blobs"))

    @route("GET", "/api/models/{repo}/tree/{revision}")
    @route("GET", "/api/models/{repo}/tree/{revision}/{folder}")
    def _tree(self, request: Request, repo: str, revision: str, folder: str = "") -> Any:
        commit = self._repo(request, repo).find(revision)
        start = folder.strip("/") + "/" if folder else ""
        names = sorted(path for path in {*commit.files, *folders(commit)} if path.startswith(start))
        if folder and not names:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        deep = request.flag("recursive")
        return [entry(commit, name) for name in names if deep or "/" not in name[len(start) :]]

    @route("POST", "/api/models/{repo}/paths-info/{revision}")
    def _paths_info(self, request: Request, repo: str, revision: str) -> Any:
        commit = self._repo(request, repo).find(revision)
        asked = parse_qs(request.body.decode()).get("paths", [])
        return [entry(commit, path) for path in asked if path in {*commit.files, *folders(commit)}]

    @route("GET", "/api/models/{repo}/refs")
    def _refs(self, request: Request, repo: str) -> Any:
        found = self._repo(request, repo)

        def listed(kind: str, refs: dict[str, Commit]) -> list[dict[str, str]]:
            return [{"name": x, "ref": f"refs/{kind}/{x}", "targetCommit": commit.id} for x, commit in refs.items()]

        refs = {"branches": listed("heads", found.branches), "tags": listed("tags", found.versions)}
        return {**refs, "converts": [], "pullRequests": []}

    @route("GET", "/{repo}/resolve/{revision}/{file}")
    def _resolve(self, request: Request, repo: str, revision: str, file: str) -> Reply:
        found = self._repo(request, repo)
        if found.gated and request.user not in found.members:
            status, reason = (401, "You must be authenticated") if request.user is None else (403, "You must ask")
            raise HubError(status, "GatedRepo", f"Access to model {repo} is restricted. {reason} to access it.")
        commit = found.find(revision)
        stored = commit.files.get(file)
        if stored is None:
            raise HubError(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": commit.id})
        spoiled = self._spoiled(file, request.method, "wrong-etag")
        etag = f'"{stored.etag[::-1] if spoiled else stored.etag}"'
        headers = {"X-Repo-Commit": commit.id, "ETag": etag}
        if not stored.lfs:
            return Reply(200, stored.data, headers, is_file=True)
        headers |= {"X-Linked-Etag": etag, "X-Linked-Size": str(len(stored.data))}
        if self.xet:
            headers |= {"X-Xet-Hash": stored.xet_hash, "X-Xet-Refresh-Route": f"{self.endpoint}/xet"}
        return Reply(302, b"", {**headers, "Location": f"{self.storage}/cdn/{repo}/{commit.id}/{quote(file)}"})

    @route("GET", "/cdn/{repo}/{revision}/{file}")
    def _stored(self, request: Request, repo: str, revision: str, file: str) -> Reply:
        return Reply(200, self.files(repo, revision)[file], is_file=True)

    # Writing

    @route("POST", "/api/repos/create")
    def _create(self, request: Request) -> Any:
        wanted = request.json
        repo_id = f"{wanted.get('organization') or request.user}/{wanted['name']}"
        if request.user is None or repo_id.split("/")[0] != request.user or wanted.get("type", "model") != "model":
            raise HubError(403 if request.user else 401, None, f"You don't have the rights to create {repo_id}")
        if repo_id in self.repos:
            return Reply(409, {"error": "You already created this model repo", "url": f"{self.endpoint}/{repo_id}"})
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        self.add_repo(repo_id, {".gitattributes": attributes}, private=private)
        return {"url": f"{self.endpoint}/{repo_id}", "name": repo_id}

    @route("DELETE", "/api/repos/delete")
    def _delete(self, request: Request) -> Any:
        repo_id = f"{request.json.get('organization') or request.user}/{request.json['name']}"
        self._repo(request, repo_id, write=True)
        del self.repos[repo_id]
        return Reply(200)

    @route("POST", "/api/models/{repo}/branch/{name}")
    def _create_branch(self, request: Request, repo: str, name: str) -> Any:
        found = self._repo(request, repo, write=True)
        return create_ref(found.branches, name, found.find(request.json.get("startingPoint", "main")))

    @route("POST", "/api/models/{repo}/tag/{revision}")
    def _create_tag(self, request: Request, repo: str, revision: str) -> Any:
        found = self._repo(request, repo, write=True)
        return create_ref(found.versions, request.json["tag"], found.find(revision))

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Any:
        start, end = request.json["content"].startswith("---\n"), "\n---" in request.json["content"]
        errors = [{"message": "yaml metadata has no end"}] if start and not end else []
        warnings = [] if start else [{"message": "empty or missing yaml metadata in repo card"}]
        return Reply(400 if errors else 200, {"errors": errors, "warnings": warnings})

    @route("POST", "/api/models/{repo}/preupload/{revision}")
    def _preupload(self, request: Request, repo: str, revision: str) -> Any:
        found = self._repo(request, repo, write=True)
        present = {path: stored.etag for path, stored in found.find(revision).files.items()}
        answers = []
        for path, size in ((file["path"], file["size"]) for file in request.json["files"]):
            mode = "lfs" if found.is_large(path, size) else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": present.get(path)})
        return {"files": answers}

    @route("POST", "/{repo}.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, repo: str) -> Any:
        found = self._repo(request, repo, write=True)
        if request.json["operation"] != "upload" or "basic" not in request.json.get("transfers", ["basic"]):
            raise HubError(422, None, "This server takes uploads, and the basic transfer only")
        objects = [{"oid": item["oid"], "size": item["size"]} for item in request.json["objects"]]
        for item in objects:
            if item["oid"] not in found.objects:
                upload = {"href": f"{self.storage}/lfs/{repo}/{item['oid']}"}
                item["actions"] = {"upload": upload, "verify": {"href": f"{self.endpoint}/{repo}.git/info/lfs/verify"}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT", "/lfs/{repo}/{oid}")
    def _store(self, request: Request, repo: str, oid: str) -> Any:
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, None, "The content is not what its name says")
        self.repos[repo].objects[oid] = request.body
        return b""

    @route("POST", "/{repo}.git/info/lfs/verify")
    def _lfs_verify(self, request: Request, repo: str) -> Any:
        large(self._repo(request, repo, write=True), request.json)
        return {}

    @route("POST", "/api/models/{repo}/commit/{revision}")
    def _commit(self, request: Request, repo: str, revision: str) -> Any:
        found = self._repo(request, repo, write=True)
        if request.flag("create_pr"):
            raise HubError(400, None, "This server has no pull requests")
        if revision not in found.branches:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dict(found.branches[revision].files)
        for line in request.body.splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                if not found.branches[revision].id.startswith(item["value"].get("parentCommit", "")):
                    raise HubError(412, None, "A commit has happened since. Please refresh and try again.")
            else:
                change(found, files, item["key"], item["value"])
        commit = found.commit(revision, files)
        return {"success": True, "commitOid": commit.id, "commitUrl": f"{self.endpoint}/{repo}/commit/{commit.id}"}


class _Listener(ThreadingHTTPServer):
    daemon_threads = False  # closing the server waits for the answers under way
    request_queue_size = 64

    def __init__(self, hub: HubServer, storage: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub, self.storage = hub, storage

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # an OSError is a client that went away
            self.hub.failures.append(traceback.format_exc())


class _Handler(BaseHTTPRequestHandler):
    server: _Listener
    protocol_version = "HTTP/1.1"
    timeout = 10

    def log_message(self, *args: object) -> None:
        pass

    def _serve(self) -> None:
        url, hub = urlsplit(self.path), self.server.hub
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, url.path, parse_qs(url.query), self.headers, sent)
        (status, body, headers, is_file), name = hub._answer(request, self.server.storage)
        # Half-read connections stay out of the clients' pools, and no thread waits for a second request.
        headers = {**headers, "Connection": "close", "Accept-Ranges": "bytes"}
        if not isinstance(body, bytes):
            headers["Content-Type"] = "application/json; charset=utf-8"
            body = json.dumps(body).encode()
        if is_file and self.command == "GET":
            status, body = self._part(body, headers)
            hub.downloads.append(name)
        fault = hub._spoiled(name, self.command, "drop", "short", "damage") if status < 300 else None
        half = body[: len(body) // 2]
        if fault == "damage":
            body = body[:-8] + bytes(byte ^ 0xFF for byte in body[-8:])
        body = half if fault == "short" else body
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(half if fault == "drop" else body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _part(self, body: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
        """The status and the part of a file that the Range header asks for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, body
        self.server.hub.ranges.append(asked[0])
        size = len(body)
        start, stop = int(asked[1]), min(size, int(asked[2] or size) + 1)
        if start >= size:
            headers["Content-Range"] = f"bytes */{size}"
            return 416, b""
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        return 206, body[start:stop]

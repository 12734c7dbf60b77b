"""A repository of the Hugging Face Hub, accessed through ``huggingface_hub`` with its cache and settings.

A repository is not trusted: only files that its ``lorun_config.json`` lists are downloaded, and only under names that
a saved conversion can have. A file with the wrong hash is downloaded again.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import _CACHED_NO_EXIST, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.utils import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..disk.folder import sha256
from ..disk.reading import parse_json, read_file
from ..errors import LoRunError
from ..files.description import MAX_BYTES, is_unchanged, parse_description
from ..files.layout import ADAPTERS_FOLDER, CARD_FILE, CONFIG_FILE, NAMES

# In some versions of huggingface_hub, a broken connection raises an error of the HTTP library instead of an OSError.
CONNECTION_ERRORS: tuple[type[BaseException], ...] = (OSError, RuntimeError, *HfHubHTTPError.__bases__)
DISK_ERRORS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EISDIR, errno.ENOENT}
DISK_ERRORS |= {errno.ENAMETOOLONG, errno.EIO, errno.EMFILE, getattr(errno, "EDQUOT", errno.ENOSPC)}
HUB_ERRORS: tuple[type[BaseException], ...] = (ValueError, *CONNECTION_ERRORS)

# Returns the names of the files to download, given the description of a repository (None if it has none, as one that
# PEFT wrote) and the requested subfolder of the conversion.
FilesNeeded = Callable[["Mapping[str, Any] | None", str], Iterable[str]]


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub; the fields are the arguments of ``huggingface_hub.hf_hub_download``.

    Attributes:
        subfolder: the folder of the conversion, or of one of its sets or stages, in the repository.
    """

    repo_id: str
    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    def fetch(self, needed: FilesNeeded) -> Path:
        """Download files of the repository, and return their folder in the cache.

        Args:
            needed: selects the files; see :data:`FilesNeeded`.

        Raises:
            LoRunError: no connection, no access, or a missing or damaged file.
        """
        parts = (self.subfolder or "").strip("/").split("/") if self.subfolder else []
        if ".." in parts:
            raise LoRunError(f"the subfolder {self.subfolder!r} leads out of {self.repo_id}: name one without '..'")
        with self.translating_errors():
            for end in range(len(parts), max(-1, len(parts) - 4), -1):
                root, key = "/".join(parts[:end]), "/".join(parts[end:])
                if f"{key}/".startswith(("/", f"{ADAPTERS_FOLDER}/")):
                    config_file = f"{root}/{CONFIG_FILE}".lstrip("/")
                    try:
                        found = self._download(config_file, self.revision)
                    except LocalEntryNotFoundError:
                        if not (
                            self.local_files_only or constants.HF_HUB_OFFLINE or self._is_known_to_lack(config_file)
                        ):
                            raise  # the description may exist, and without it no file could be checked
                        continue
                    except EntryNotFoundError:
                        continue
                    return self._fetch_described(found, root, key, needed)
            return self._fetch_others("/".join(parts), needed)

    @property
    def _cache_path(self) -> str | None:
        return None if self.cache_dir is None else os.fspath(self.cache_dir)

    def _is_known_to_lack(self, name: str) -> bool:
        """Whether the cache knows from an earlier connection that the repository has no such file."""
        held = try_to_load_from_cache(self.repo_id, name, cache_dir=self._cache_path, revision=self.revision)
        return held is _CACHED_NO_EXIST

    def _fetch_described(self, found: Path, root: str, key: str, needed: FilesNeeded) -> Path:
        """Download files that a description lists, all from the same commit as the description."""
        config_file = f"{root}/{CONFIG_FILE}".lstrip("/")
        commit = _commit(found, config_file)
        file = self._verified(config_file, commit, _is_intact_description)
        description = parse_description(read_file(file.parent, file.name, MAX_BYTES), file)
        for name in needed(description, key):
            if not NAMES.fullmatch(name) or name not in description["files"]:
                raise LoRunError(
                    f"{self.repo_id} lists {name[:100]!r}, which is not a file of a conversion: use another "
                    "repository, as this one is damaged or forged"
                )
            is_card = PurePosixPath(name).name == CARD_FILE  # which people edit on the Hub
            has_digest = functools.partial(_has_digest, description["files"][name])
            self._verified(f"{root}/{name}".lstrip("/"), commit, _matches_its_name if is_card else has_digest)
        return found.parent / key

    def _fetch_others(self, place: str, needed: FilesNeeded) -> Path:
        """Download files from a repository without a description, as PEFT writes them."""
        commit, files = self.revision, [f"{place}/{name}".lstrip("/") for name in needed(None, "")]
        for name in files:
            path = self._verified(name, commit, _matches_its_name)
            commit = _commit(path, name)
        return path.parents[len(PurePosixPath(files[-1]).parts) - 1] / place

    def _download(self, name: str, revision: str | None, again: bool = False) -> Path:
        return Path(
            hf_hub_download(
                self.repo_id,
                name,
                revision=revision,
                token=self.token,
                cache_dir=self._cache_path,
                local_files_only=self.local_files_only,
                force_download=again,
                library_name="lorun-adapt",
            )
        )

    def _verified(self, name: str, revision: str | None, is_intact: Callable[[Path], bool]) -> Path:
        """Download a file and check it; if the cached copy is damaged, download it again."""
        try:
            path = self._download(name, revision)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise LoRunError(
                f"no {name} in {self.repo_id}: give the adapter's folder with subfolder=, and, if PEFT wrote it, its "
                "stage with stage="
            ) from error
        if is_intact(path):
            return path
        if not self.local_files_only:
            try:
                if not path.is_symlink():  # hf_hub_download would not replace a copy that is not a link
                    path.unlink()
                path = self._download(name, revision, again=True)
            except HUB_ERRORS:  # no connection; the error below reports the damaged file
                pass
            else:
                if is_intact(path):
                    return path
        raise LoRunError(
            f"{name} of {self.repo_id} has the wrong hash, so it is damaged or was changed: try again, or ask its "
            "author"
        )

    @contextmanager
    def translating_errors(self) -> Iterator[None]:
        """Turn the errors of the Hub and of the connection into a :class:`LoRunError` of one sentence."""
        name = f"{self.repo_id} at {self.revision}" if self.revision else self.repo_id
        try:
            yield
        except LoRunError:
            raise
        except GatedRepoError as error:
            raise LoRunError(
                f"no access to {name}, whose authors grant it on request: request access on the repository's page, and "
                "log in"
            ) from error
        except RepositoryNotFoundError as error:
            raise LoRunError(
                f"no repository {name}, or it is private: check the name, and log in or pass token="
            ) from error
        except RevisionNotFoundError as error:
            raise LoRunError(
                f"no revision {self.revision!r} of {self.repo_id}: name a branch, tag or commit of it"
            ) from error
        except LocalEntryNotFoundError as error:
            reason = f" ({_first_line(error.__cause__)})" if error.__cause__ is not None else ""
            raise LoRunError(
                f"cannot reach the Hub, and {name} is not in the cache{reason}: connect once to download it"
            ) from error
        except HFValidationError as error:
            raise LoRunError(
                f"expected a repository as 'user/name', found {self.repo_id!r}: {_first_line(error)}"
            ) from error
        except CONNECTION_ERRORS as error:
            if _is_of_the_disk(error):
                raise LoRunError(
                    f"cannot keep files of {name} on this disk ({_first_line(error)}): free some space, make the "
                    "folder writable, or choose another one with cache_dir= or HF_HOME"
                ) from error
            raise LoRunError(
                f"the request to the Hub for {name} failed ({_first_line(error)}): check the connection and the token, "
                "and try again"
            ) from error
        except ValueError as error:  # huggingface_hub or the Hub refuses an argument or the card
            raise LoRunError(
                f"the Hub refuses a value for {name} ({_one_line(error)}): correct this argument, or this field "
                "of the card"
            ) from error


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether an error is of a file on this machine, and not of the connection."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS and not isinstance(error, ConnectionError)


def _commit(path: Path, name: str) -> str:
    """Return the commit of a file in the cache."""
    return path.parents[len(PurePosixPath(name).parts) - 1].name


def _has_digest(digest: str, path: Path) -> bool:
    return sha256(path) == digest


def _matches_its_name(path: Path) -> bool:
    """Whether a large file has the hash in its name in the cache; the names of small files are no SHA-256 hashes."""
    blob = Path(os.readlink(path)).name if path.is_symlink() else path.name  # readlink: the blob may be a link itself
    return re.fullmatch("[0-9a-f]{64}", blob) is None or sha256(path) == blob


def _is_intact_description(path: Path) -> bool:
    try:
        content = parse_json(read_file(path.parent, path.name, MAX_BYTES), str(path))
    except LoRunError:
        return False
    return isinstance(content, dict) and is_unchanged(content)


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__

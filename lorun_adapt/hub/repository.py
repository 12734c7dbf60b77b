"""A repository of the Hugging Face Hub, through ``huggingface_hub``'s own calls, cache and settings.

Nothing is trusted: only files that the repository's ``lorun_config.json`` names are fetched, under names that a saved
conversion has. A file whose hash is wrong is fetched again.
"""

from __future__ import annotations

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
from ..files.layout import ADAPTERS_FOLDER, CONFIG_FILE, NAMES

# With some versions, what is raised for a broken connection is no OSError but what the library for HTTP raises.
BROKEN: tuple[type[BaseException], ...] = (OSError, RuntimeError, *HfHubHTTPError.__bases__)
BROKEN_OR_REFUSED: tuple[type[BaseException], ...] = (ValueError, *BROKEN)

# From the description of a repository (None where it has none, as one of PEFT's) and the place in it that is asked for,
# the names of the files to fetch.
FilesNeeded = Callable[["Mapping[str, Any] | None", str], Iterable[str]]


@dataclass(frozen=True)
class Repository:
    """A repository of the Hub and how to reach it; the fields are ``huggingface_hub``'s arguments.

    Attributes:
        subfolder: where in it the conversion, or one of its sets or stages, is.
    """

    repo_id: str
    revision: str | None = None
    subfolder: str | None = None
    token: str | bool | None = None
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    def fetch(self, needed: FilesNeeded) -> Path:
        """The folder in the cache that the repository's files are in, with those that are needed.

        Args:
            needed: from the description (None where there is none, as in a repository of PEFT's) and the place in
                the conversion that ``subfolder`` is, the names of files.

        Raises:
            LoRunError: what can't be reached, is not there or not for us, or is damaged.
        """
        parts = (self.subfolder or "").strip("/").split("/") if self.subfolder else []
        if ".." in parts:
            raise LoRunError(
                f"expected a folder within {self.repo_id}, found {self.subfolder!r}: name one without '..'"
            )
        with self.translating_errors():
            for end in range(len(parts), max(-1, len(parts) - 4), -1):
                root, key = "/".join(parts[:end]), "/".join(parts[end:])
                if f"{key}/".startswith(("/", f"{ADAPTERS_FOLDER}/")):
                    own = f"{root}/{CONFIG_FILE}".lstrip("/")
                    try:
                        found = self._download(own, self.revision)
                    except LocalEntryNotFoundError:
                        if not (self.local_files_only or constants.HF_HUB_OFFLINE or self._is_known_to_lack(own)):
                            raise  # it may be there: without it nothing could be told from damage
                        continue
                    except EntryNotFoundError:
                        continue
                    return self._fetch_described(found, root, key, needed)
            return self._fetch_others("/".join(parts), needed)

    @property
    def _cache_path(self) -> str | None:
        return None if self.cache_dir is None else os.fspath(self.cache_dir)

    def _is_known_to_lack(self, name: str) -> bool:
        """Whether there was no such file when there was a connection."""
        held = try_to_load_from_cache(self.repo_id, name, cache_dir=self._cache_path, revision=self.revision)
        return held is _CACHED_NO_EXIST

    def _fetch_described(self, found: Path, root: str, key: str, needed: FilesNeeded) -> Path:
        """Files that a description names, all of the commit that it is from."""
        own = f"{root}/{CONFIG_FILE}".lstrip("/")
        commit = _commit(found, own)
        file = self._whole(own, commit, _is_whole_description)
        description = parse_description(read_file(file.parent, file.name, MAX_BYTES), file)
        for name in needed(description, key):
            if not NAMES.fullmatch(name) or name not in description["files"]:
                raise LoRunError(
                    f"expected files of a conversion in {self.repo_id}, found {name[:100]!r}: do not trust it"
                )
            digest = description["files"][name]
            self._whole(f"{root}/{name}".lstrip("/"), commit, functools.partial(_has_digest, digest))
        return found.parent / key

    def _fetch_others(self, place: str, needed: FilesNeeded) -> Path:
        """Files of which no description tells, as PEFT writes them."""
        commit, files = self.revision, [f"{place}/{name}".lstrip("/") for name in needed(None, "")]
        for name in files:
            path = self._whole(name, commit, _has_its_name)
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

    def _whole(self, name: str, revision: str | None, is_whole: Callable[[Path], bool]) -> Path:
        """A file that is as it was saved; one that the cache holds damaged is fetched anew."""
        try:
            path = self._download(name, revision)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise LoRunError(
                f"expected {name} in {self.repo_id}, found no such file: say with subfolder= where the adapter is and, "
                "of one that PEFT wrote, with stage= whose"
            ) from error
        if is_whole(path):
            return path
        if not self.local_files_only:
            try:
                if not path.is_symlink():  # the client would keep a copy that is no link
                    path.unlink()
                path = self._download(name, revision, again=True)
            except BROKEN_OR_REFUSED:  # there is no connection now
                pass
            else:
                if is_whole(path):
                    return path
        raise LoRunError(
            f"expected {name} of {self.repo_id} as it was saved, found another hash: it was changed or damaged on the "
            "way; try again, or ask its author"
        )

    @contextmanager
    def translating_errors(self) -> Iterator[None]:
        """One sentence for whatever the Hub or the way there has to say."""
        name = f"{self.repo_id} at {self.revision}" if self.revision else self.repo_id
        try:
            yield
        except LoRunError:
            raise
        except GatedRepoError as error:
            raise LoRunError(
                f"expected access to {name}, found that its authors grant it on request: ask for it on the "
                "repository's page, and log in"
            ) from error
        except RepositoryNotFoundError as error:
            raise LoRunError(
                f"expected a repository {name}, found none, or a private one: check the name, and log in or pass token="
            ) from error
        except RevisionNotFoundError as error:
            raise LoRunError(
                f"expected a revision {self.revision!r} of {self.repo_id}, found none: name another"
            ) from error
        except LocalEntryNotFoundError as error:
            reason = f" ({_first_line(error.__cause__)})" if error.__cause__ is not None else ""
            raise LoRunError(
                f"expected to reach the Hub, or {name} in the cache, found neither{reason}: connect once to download it"
            ) from error
        except HFValidationError as error:
            raise LoRunError(
                f"expected a repository as 'user/name', found {self.repo_id!r}: {_first_line(error)}"
            ) from error
        except BROKEN as error:
            raise LoRunError(f"expected an answer about {name}, found {_first_line(error)}: try again") from error
        except ValueError as error:  # what the client, or the Hub, does not take: a subfolder, a token, a card
            raise LoRunError(f"expected what the Hub takes for {name}, found {_one_line(error)}: change it") from error


def _commit(path: Path, name: str) -> str:
    """The commit that a file of the cache is of."""
    return path.parents[len(PurePosixPath(name).parts) - 1].name


def _has_digest(digest: str, path: Path) -> bool:
    return sha256(path) == digest


def _has_its_name(path: Path) -> bool:
    """Whether a large file is what the cache names it after, its hash; of small ones that is not known."""
    blob = Path(os.readlink(path)).name if path.is_symlink() else path.name  # which may itself be a link
    return re.fullmatch("[0-9a-f]{64}", blob) is None or sha256(path) == blob


def _is_whole_description(path: Path) -> bool:
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

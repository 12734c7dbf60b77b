"""."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from ..disk.folder import as_path, replace_folder, sha256
from ..disk.reading import parse_json, read_file
from ..errors import LoRunError
from ..files.layout import ADAPTERS_FOLDER, BASE_FILE, CONFIG_FILE, NAMES, PEFT_CONFIG_FILE, SET_CONFIG_FILE
from ..files.save import check_keeps_base, foreign_entries
from .repository import LARGEST, Repository, _description
from .source import is_repository


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
) -> str:
    """Upload a saved conversion, or adapters saved alone; see :meth:`LoRunModel.push_to_hub`."""
    description = _description(folder / CONFIG_FILE)
    for name, digest in description["files"].items():
        if not NAMES.fullmatch(name) or not (folder / name).is_file() or sha256(folder / name) != digest:
            raise LoRunError(
                f"expected {name[:100]!r} in {folder} as it was saved, found it missing or changed: save it anew"
            )
    api = HfApi(token=token, library_name="lorun-adapt")
    with Repository(repo_id, revision).translating_errors():
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id  # with the user's name
        there = revision is None or api.revision_exists(repo_id, revision)
        if BASE_FILE not in description["files"] and api.file_exists(
            repo_id, BASE_FILE, revision=revision if there else None
        ):
            raise LoRunError(
                f"expected a repository for adapters alone, found {BASE_FILE} in {repo_id}, which they need not fit: "
                "push with the base, or to another repository"
            )
        if revision is not None and not there:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            revision=revision,
            commit_message=f"Upload {', '.join(description['adapters'])} with lorun-adapt",
            allow_patterns=[CONFIG_FILE, *(glob.escape(name) for name in description["files"])],
            delete_patterns=[f"{ADAPTERS_FOLDER}/*"],  # sets that are no more
        )
    return str(commit)


def pull(repository: Repository, out: Path) -> None:
    """Download all of a conversion, or of adapters saved alone, to a folder, which appears whole or not at all.

    Raises:
        LoRunError: as :meth:`Repository.fetch`, or a folder that holds something else.
    """

    def everything(description: Mapping[str, Any] | None, key: str) -> list[str]:
        if description is None or key:
            raise LoRunError(
                f"expected a conversion in {repository.repo_id}, found no {CONFIG_FILE}: name its subfolder"
            )
        return list(description["files"])

    source = repository.fetch(everything)
    names = [CONFIG_FILE, *_description(source / CONFIG_FILE)["files"]]
    if BASE_FILE not in names:
        check_keeps_base(out)

    def fill(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)

    replace_folder(out, foreign_entries, CONFIG_FILE, fill)


def list_adapters(source: str, revision: str | None = None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The description of a folder or a repository, and what each set's configs say: its own, and its first stage's."""
    wanted: dict[str, dict[str, str]] = {}

    def configs(description: Mapping[str, Any] | None, key: str) -> Iterable[str]:
        if description is None or key:
            raise LoRunError(f"expected a conversion in {source}, found no {CONFIG_FILE}: name another")
        for file in sorted(description["files"]):
            kind = os.path.basename(file)
            if file.startswith(f"{ADAPTERS_FOLDER}/") and kind in (PEFT_CONFIG_FILE, SET_CONFIG_FILE):
                wanted.setdefault(file.split("/")[1], {}).setdefault(kind, file)
        return [file for files in wanted.values() for file in files.values()]

    if is_repository(source):
        folder = Repository(source, revision).fetch(configs)
        description = _description(folder / CONFIG_FILE)
    else:
        folder = as_path(source)
        if revision is not None or not (folder / CONFIG_FILE).is_file():
            raise LoRunError(f"expected a saved conversion or user/name of the Hub, found {source!r}: name another")
        description = _description(folder / CONFIG_FILE)
        configs(description, "")
    found: dict[str, dict[str, Any]] = {}
    for name, files in wanted.items():
        read = [parse_json(read_file(folder, file, LARGEST), file) for file in files.values()]
        found[name] = {key: value for part in read if isinstance(part, dict) for key, value in part.items()}
    return description, found

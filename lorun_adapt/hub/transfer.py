"""Upload a saved conversion to the Hub, download one, and list its sets."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from ..disk.folder import as_path, replace_folder, sha256
from ..disk.reading import parse_json, read_file
from ..errors import LoRunError
from ..files.description import MAX_BYTES, read_description
from ..files.layout import ADAPTERS_FOLDER, BASE_FILE, CARD_FILE, CONFIG_FILE, NAMES, PEFT_CONFIG_FILE, SET_CONFIG_FILE
from ..files.save import check_keeps_base, foreign_entries
from ..files.saved import edited_cards
from .repository import HUB_ERRORS, Repository
from .source import is_repository


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a saved folder; see :meth:`LoRunModel.push_to_hub`."""
    description = read_description(folder)
    edited = edited_cards(folder, description)
    for name, digest in description["files"].items():
        is_there = NAMES.fullmatch(name) is not None and (folder / name).is_file()
        if not is_there or (name not in edited and sha256(folder / name) != digest):
            raise LoRunError(f"{name[:100]!r} in {folder} is missing or has changed since it was saved: save it again")
    api = HfApi(token=token, library_name="lorun-adapt")
    with Repository(repo_id, revision).translating_errors():
        try:
            new, repo_id = True, api.create_repo(repo_id, private=private).repo_id  # with the user's name added
        except HfHubHTTPError:  # it is there, or this says what else is wrong
            new, repo_id = False, api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        try:
            return _upload(api, repo_id, folder, description, revision, commit_message, create_pr)
        except BaseException:
            if new and revision is None and not create_pr:  # what these have is not in the list of files
                _delete_if_empty(api, repo_id)
            raise


def _upload(
    api: HfApi,
    repo_id: str,
    folder: Path,
    description: Mapping[str, Any],
    revision: str | None,
    commit_message: str | None,
    create_pr: bool,
) -> str:
    there = revision is None or api.revision_exists(repo_id, revision)
    adapters_only = BASE_FILE not in description["files"]
    if adapters_only and api.file_exists(repo_id, BASE_FILE, revision=revision if there else None):
        raise LoRunError(
            f"{repo_id} has a {BASE_FILE} that these adapters may not fit: push them with their base, or to another "
            "repository"
        )
    if revision is not None and not there:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    names = [CONFIG_FILE, *description["files"]]
    is_as_written = CARD_FILE in names and CARD_FILE not in edited_cards(folder, description)
    if there and is_as_written and _has_edited_card(api, repo_id, revision):
        names.remove(CARD_FILE)
        warnings.warn(f"the {CARD_FILE} of {repo_id} was edited there, so it is kept as it is", stacklevel=3)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=str(folder),
        revision=revision,
        commit_message=commit_message or f"Upload {', '.join(description['adapters'])} with lorun-adapt",
        create_pr=create_pr,
        allow_patterns=[glob.escape(name) for name in names],
        delete_patterns=[f"{ADAPTERS_FOLDER}/*"],  # sets that the folder no longer has
    )
    return str(commit)


def _has_edited_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the card of a repository is no longer the one that was uploaded with its conversion."""
    try:
        snapshot = Path(api.hf_hub_download(repo_id, CONFIG_FILE, revision=revision)).parent
        api.hf_hub_download(repo_id, CARD_FILE, revision=snapshot.name)
        return CARD_FILE in edited_cards(snapshot, read_description(snapshot))
    except (EntryNotFoundError, HfHubHTTPError, LoRunError):  # it has none; if there is no access, uploading says so
        return False


def _delete_if_empty(api: HfApi, repo_id: str) -> None:
    """Delete a repository that was made for an upload which failed."""
    with contextlib.suppress(*HUB_ERRORS):  # the upload's error is raised
        if set(api.list_repo_files(repo_id)) <= {".gitattributes"}:
            api.delete_repo(repo_id, missing_ok=True)


def pull(repository: Repository, out: Path) -> None:
    """Download a saved folder. ``out`` is written completely or not at all.

    Raises:
        LoRunError: as :meth:`Repository.fetch`; ``out`` has other files in it; adapters would replace a base.
    """

    def everything(description: Mapping[str, Any] | None, key: str) -> list[str]:
        if description is None or key:
            raise LoRunError(f"no {CONFIG_FILE} in {repository.repo_id}: give the conversion's folder with subfolder=")
        return list(description["files"])

    source = repository.fetch(everything)
    names = [CONFIG_FILE, *read_description(source)["files"]]
    if BASE_FILE not in names:
        check_keeps_base(out)

    def fill(folder: Path) -> None:
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, folder / name)

    replace_folder(out, foreign_entries, CONFIG_FILE, fill)


def list_adapters(source: str, revision: str | None = None) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """List the sets of a saved conversion.

    Args:
        source: a folder, or a repository of the Hub as ``user/name``.
        revision: of the repository.

    Returns:
        The description, and for each set the entries of its ``set_config.json`` and of the ``adapter_config.json`` of
        its first stage.

    Raises:
        LoRunError: no conversion in ``source``; as :meth:`Repository.fetch`.
    """
    config_files: dict[str, dict[str, str]] = {}

    def configs(description: Mapping[str, Any] | None, key: str) -> Iterable[str]:
        if description is None or key:
            raise LoRunError(f"no {CONFIG_FILE} in {source}: name a repository or folder with a conversion")
        for file in sorted(description["files"]):
            kind = os.path.basename(file)
            if file.startswith(f"{ADAPTERS_FOLDER}/") and kind in (PEFT_CONFIG_FILE, SET_CONFIG_FILE):
                config_files.setdefault(file.split("/")[1], {}).setdefault(kind, file)
        return [file for files in config_files.values() for file in files.values()]

    if is_repository(source):
        folder = Repository(source, revision).fetch(configs)
        description = read_description(folder)
    else:
        folder = as_path(source)
        if revision is not None and folder.is_dir():
            raise LoRunError(f"{source!r} is a folder, which has no revisions: leave the revision out")
        if not (folder / CONFIG_FILE).is_file():
            raise LoRunError(
                f"{source!r} is neither a saved conversion nor a repository user/name of the Hub: name another source"
            )
        description = read_description(folder)
        configs(description, "")
    entries: dict[str, dict[str, Any]] = {}
    for name, files in config_files.items():
        parts = [parse_json(read_file(folder, file, MAX_BYTES), file) for file in files.values()]
        entries[name] = {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}
    return description, entries

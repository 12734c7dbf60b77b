"""Write folders and files that appear whole or not at all; hash files."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO, TypeVar

from ..errors import LoRunError
from .locks import lock, locked, unlock

Loaded = TypeVar("Loaded")

PARTIAL, OLD = ".partial", ".old"
RETRIES = 20
LONG = 100  # characters of a name; a temporary name begins with no more of it


def sha256(path: Path) -> str:
    """Return the SHA-256 hash of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensor_bytes(folder: Path) -> int:
    """Return the total size in bytes of the safetensors files in ``folder`` and the folders within it."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def replace_folder(
    target: Path, foreign: Callable[[Path], Iterable[str]], marker: str, fill: Callable[[Path], object]
) -> None:
    """Replace the folder ``target`` by one that ``fill`` writes; a process killed meanwhile leaves the old or new one.

    Args:
        target: the folder; it and the folders around it are made where they do not exist.
        foreign: called with the old folder, returns the paths within it that were not written by an earlier save;
            they are copied into the new folder, unless ``fill`` has written the same.
        marker: the file that an existing folder must hold to be replaced; an empty folder need not.
        fill: called with an empty folder beside ``target``, writes the content.

    Raises:
        LoRunError: ``target`` is a file, a folder without the marker, read-only or the current folder, or the
            disk refuses to write.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as here:
    ...     target = Path(here) / "saved"
    ...     for text in ("old", "new"):
    ...         replace_folder(
    ...             target,
    ...             foreign=lambda folder: [],
    ...             marker="config.json",
    ...             fill=lambda folder: (folder / "config.json").write_text(text),
    ...         )
    ...     (target / "config.json").read_text()
    'new'
    """
    try:
        target = Path(os.path.realpath(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        restore_interrupted_save(target)
        _check_replaceable(target, marker)
        with locked(target.parent) as is_locked:
            _remove_abandoned(target, is_locked)
            new = _made_beside(target, PARTIAL, os.mkdir)
            lock_of_new = lock(new)
    except OSError as error:
        raise LoRunError(
            f"cannot write in {target.parent}: {_reason_of(error)}; choose another folder, or make room"
        ) from error
    try:
        fill(new)
        with locked(target.parent):
            for name in foreign(target) if target.is_dir() else ():
                if not os.path.lexists(new / name):
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    _copy(target / name, new / name)
            _sync(new)
            _swap(new, target)
            _sync_entry(target.parent)
    except OSError as error:
        raise LoRunError(
            f"cannot write {target}: {_reason_of(error)}; what was there is unchanged: choose another folder, or make "
            "room"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        unlock(lock_of_new)


def check_place(target: Path, marker: str) -> None:
    """Check before long work that :func:`replace_folder` could write ``target`` after it.

    Raises:
        LoRunError: as :func:`replace_folder`.
    """
    target = Path(os.path.realpath(target))
    try:
        _check_replaceable(target, marker)
        parent = next(path for path in target.parents if path.exists())
    except OSError as error:
        raise LoRunError(f"cannot write {target}: {_reason_of(error)}; choose another folder") from error
    if not os.access(parent, os.W_OK):
        raise LoRunError(f"cannot write {target}: {parent} is not writable; choose another folder")


def _check_replaceable(target: Path, marker: str) -> None:
    if target.exists() and not target.is_dir():
        raise LoRunError(f"expected a folder to save to, found a file at {target}: choose another path")
    here = Path(os.path.realpath(os.curdir))
    if target.is_dir() and (here == target or target in here.parents):
        raise LoRunError(f"cannot replace {target}: it is, or holds, the current directory; save to a folder within it")
    if os.path.ismount(target):
        raise LoRunError(f"cannot replace {target}: something is mounted there; save to a folder within it")
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise LoRunError(
            f"expected an empty folder or a saved network in {target}, found other files: choose another folder"
        )
    if target.is_dir() and not os.access(target, os.W_OK):
        raise LoRunError(f"cannot replace {target}: it is read-only; choose another folder")


def write_file(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write the file ``path``, which appears whole or not at all, with the bytes that ``fill`` writes.

    Folders around it are made where they do not exist.

    Raises:
        LoRunError: the disk refuses to make the folder or to write.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as here:
    ...     write_file(Path(here) / "new/page.html", lambda file: file.write(b"<html>"))
    ...     (Path(here) / "new/page.html").read_bytes()
    b'<html>'
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = _made_beside(path, PARTIAL, lambda new: new.open("xb").close())
        try:
            with partial.open("wb") as file:
                fill(file)
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise LoRunError(f"cannot write {path}: {_reason_of(error)}; choose another folder") from error


def _made_beside(target: Path, suffix: str, make: Callable[[Path], object]) -> Path:
    """Make a temporary file or folder beside ``target``, with the permissions that the system gives new ones."""
    while True:
        path = target.with_name(f"{_prefix(target)}{secrets.token_hex(4)}{suffix}")
        try:
            make(path)
        except FileExistsError:
            continue
        return path


def _left_beside(target: Path, suffix: str) -> list[Path]:
    """The temporary files and folders of ``target``."""
    own = re.compile(re.escape(_prefix(target)) + "[a-z0-9_]{8}" + re.escape(suffix))
    return [path for path in target.parent.glob(f".*{suffix}") if own.fullmatch(path.name)]


def _prefix(target: Path) -> str:
    """How the names of temporary files and folders beside ``target`` begin."""
    name = target.name
    if len(name) > LONG:  # two of them may begin alike
        name = f"{name[:LONG]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:8]}"
    return f".{name}."


def _copy(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def _sync(folder: Path) -> None:
    """Make the system write all of ``folder`` to the disk."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            _sync_entry(path)


def _sync_entry(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows cannot open folders
        if not path.is_dir():
            raise
        return
    try:
        os.fsync(handle)
    except OSError as error:  # some file systems have no fsync for folders
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


# --- after a killed process -----------------------------------------------------------------------


def restore_interrupted_save(target: Path) -> None:
    """Put the old folder back where a process was killed between moving it away and putting the new one in its place.

    This can only happen on systems that cannot exchange two folders in one step, see :func:`_swap`.
    """
    if os.path.lexists(target) or not _left_beside(target, OLD):
        return
    with locked(target.parent) as is_locked:
        olds = [path for path in _left_beside(target, OLD) if any(path.iterdir())]
        if is_locked and olds and not os.path.lexists(target):
            os.rename(max(olds, key=lambda path: path.stat().st_ctime), target)


def retry_if_replaced(folder: Path, load: Callable[[], Loaded]) -> Loaded:
    """Return what ``load`` returns; call it again where it fails because a save has replaced ``folder`` meanwhile."""
    for _ in range(RETRIES):
        before = _identity(folder)
        try:
            return load()
        except LoRunError:
            if _identity(folder) == before:
                raise
    return load()


def _identity(folder: Path) -> tuple[int, ...] | None:
    """What changes where another folder is put in the place of ``folder``; None where there is none."""
    try:
        status = os.stat(folder)
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def _remove_abandoned(target: Path, is_locked: bool) -> None:
    """Remove what killed processes have left beside ``target``; old folders only where the parent is locked."""
    if is_locked and target.is_dir():
        for path in _left_beside(target, OLD):
            shutil.rmtree(path, ignore_errors=True)
    for path in _left_beside(target, PARTIAL):
        handle = lock(path) if path.is_dir() and not path.is_symlink() else None
        if handle is not None:
            shutil.rmtree(path, ignore_errors=True)
            unlock(handle)


# --- the swap ------------------------------------------------------------------------------------


def _swap(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target``, in one step where the system can."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        old = _made_beside(target, OLD, os.mkdir)
        old.rmdir()  # Windows cannot rename a folder onto another
        os.replace(target, old)
        try:
            os.rename(new, target)
        except OSError:
            os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one step, with renameat2 (Linux) or renamex_np (macOS); return False without them."""
    if sys.platform == "win32":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    if sys.platform.startswith("linux") and hasattr(libc, "renameat2"):
        at_fdcwd, rename_exchange = -100, 2
        return libc.renameat2(at_fdcwd, first, at_fdcwd, second, rename_exchange) == 0
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        rename_swap = 2
        return libc.renamex_np(first, second, rename_swap) == 0
    return False


def as_path(path: object) -> Path:
    """Return a path that a user has given, a str or a path object, as a Path.

    Raises:
        LoRunError: it is neither, or holds what no path can.

    >>> as_path("saved/net").name
    'net'
    """
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
        os.fsencode(text)
        if not isinstance(text, str) or "\0" in text:
            raise ValueError("bytes, or a zero character")
    except (TypeError, ValueError) as error:
        raise LoRunError(f"expected a path, found {path!r}: give a str or a pathlib.Path") from error
    return Path(text)


def _reason_of(error: OSError) -> str:
    if isinstance(error, shutil.Error):
        return "it holds other files, which cannot be copied"
    return error.strerror or str(error) or type(error).__name__

"""Folders that appear whole or not at all, and files that are what their hash says."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from ..errors import LoRunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

Loaded = TypeVar("Loaded")

PARTIAL, OLD = ".partial", ".old"
RETRIES = 20
PATIENCE = 20.0  # seconds to wait for another process's save


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else _digest(file)


def tensor_bytes(folder: Path) -> int:
    """The bytes of all safetensors files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _digest(file) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def replace_folder(
    target: Path, foreign: Callable[[Path], Iterable[str]], marker: str, fill: Callable[[Path], None]
) -> None:
    """Make ``target`` the folder that ``fill`` writes; a killed process leaves the old or the new one.

    Args:
        foreign: the names within the folder that is there of what is not ours to replace; it is carried over.
        marker: the file that an existing folder must hold to be replaced.

    Raises:
        LoRunError: ``target`` exists and is something else, or can't be written.
    """
    try:
        target = Path(os.path.realpath(target))
        target.parent.mkdir(parents=True, exist_ok=True)
        restore_interrupted_save(target)
        _check_replaceable(target, marker)
        with _locked(target.parent) as alone:
            _remove_abandoned(target, alone)
            new = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=PARTIAL, dir=target.parent))
            mine = _lock(new)
    except OSError as error:
        raise LoRunError(
            f"expected to write beside {target}, found {_reason(error)}: choose another folder, or make room"
        ) from error
    try:
        new.chmod(0o777 & ~_umask())
        fill(new)
        with _locked(target.parent):
            for name in foreign(target) if target.is_dir() else ():
                if not os.path.lexists(new / name):
                    (new / name).parent.mkdir(parents=True, exist_ok=True)
                    _carry_over(target / name, new / name)
            _sync(new)
            _swap(new, target)
            _sync_entry(target.parent)
    except OSError as error:
        raise LoRunError(
            f"expected to write {target}, found {_reason(error)}: what was there is unchanged; choose another folder, "
            "or make room"
        ) from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
        _unlock(mine)


def check_place(target: Path, marker: str) -> None:
    """Refuse, before long work, what :func:`replace_folder` would refuse after it.

    Raises:
        LoRunError: as there.
    """
    target = Path(os.path.realpath(target))
    try:
        _check_replaceable(target, marker)
        above = next(path for path in target.parents if path.exists())
    except OSError as error:
        raise LoRunError(f"expected to write {target}, found {_reason(error)}: choose another folder") from error
    if not target.exists() and not os.access(above, os.W_OK):
        raise LoRunError(f"expected to write {target}, found that nothing may be in {above}: choose another folder")


def _check_replaceable(target: Path, marker: str) -> None:
    if target.exists() and not target.is_dir():
        raise LoRunError(f"expected a folder to save to, found a file at {target}: choose another place")
    here = Path(os.path.realpath(os.curdir))
    if target.is_dir() and (here == target or target in here.parents):
        raise LoRunError(
            f"expected a folder that can be replaced, found {target}, in which this program runs: save to one within it"
        )
    if target.is_dir() and any(target.iterdir()) and not (target / marker).is_file():
        raise LoRunError(
            f"expected an empty folder or a saved network in {target}, found other files: choose another folder"
        )
    if target.is_dir() and not os.access(target, os.W_OK):
        raise LoRunError(
            f"expected a folder that can be replaced, found a read-only one at {target}: choose another folder"
        )


def write_file(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Write one file, which appears whole or not at all.

    Raises:
        LoRunError: the folder can't be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=PARTIAL, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                fill(file)
            os.chmod(partial, 0o666 & ~_umask())
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise LoRunError(f"expected to write {path}, found {_reason(error)}: choose another folder") from error


def _prefix(target: Path) -> str:
    return f".{target.name[:100]}."


def _carry_over(source: Path, target: Path) -> None:
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target, follow_symlinks=False)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            _sync_entry(path)


def _sync_entry(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
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


# --- several processes ---------------------------------------------------------------------------
#
# A process holds a lock on the folder that it fills; the system lets go of it when the process
# ends, however it ends. The folder around is locked while entries in it change.


def _lock(folder: Path, seconds: float = 0.0) -> int | None:
    """A handle that holds the lock; None where another process keeps it, or the system has no such locks."""
    if fcntl is None:
        return None
    handle, end = os.open(folder, os.O_RDONLY), time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES) or time.monotonic() > end:
                os.close(handle)
                return None
        time.sleep(0.005)


def _unlock(handle: int | None) -> None:
    if handle is not None:
        fcntl.flock(handle, fcntl.LOCK_UN)  # closing is not enough where a forked process has the handle too
        os.close(handle)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether no other process is saving in ``folder`` meanwhile, as far as locks can tell."""
    handle = _lock(folder, PATIENCE)  # without it, two saves at the same moment could fail, but lose nothing
    try:
        yield handle is not None
    finally:
        _unlock(handle)


def restore_interrupted_save(target: Path) -> None:
    """Put the old folder back where a process was killed before it had put the new one into its place.

    That can only be where the system has no exchange of folders in one step, see :func:`_swap`.
    """
    if os.path.lexists(target) or not any(target.parent.glob(f"{glob.escape(_prefix(target))}*{OLD}")):
        return
    with _locked(target.parent) as alone:
        olds = [path for path in target.parent.glob(f"{glob.escape(_prefix(target))}*{OLD}") if any(path.iterdir())]
        if alone and olds and not os.path.lexists(target):
            os.rename(max(olds, key=lambda path: path.stat().st_ctime), target)


def retry_if_replaced(folder: Path, load: Callable[[], Loaded]) -> Loaded:
    """What ``load`` returns, tried again where a save has put another folder in the place meanwhile."""
    for _ in range(RETRIES):
        before = _identity(folder)
        try:
            return load()
        except LoRunError:
            if _identity(folder) == before:
                raise
    return load()


def _identity(folder: Path) -> tuple[int, ...] | None:
    try:
        found = os.stat(folder)
    except (OSError, ValueError):
        return None
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)


def _remove_abandoned(target: Path, alone: bool) -> None:
    """Remove what killed processes have left of saves of ``target``."""
    if alone and target.is_dir():
        for path in target.parent.glob(f"{glob.escape(_prefix(target))}*{OLD}"):
            shutil.rmtree(path, ignore_errors=True)
    for path in target.parent.glob(f"{glob.escape(_prefix(target))}*{PARTIAL}"):
        handle = _lock(path) if path.is_dir() and not path.is_symlink() else None
        if handle is not None:
            shutil.rmtree(path, ignore_errors=True)
            _unlock(handle)


# --- the swap ------------------------------------------------------------------------------------


def _swap(new: Path, target: Path) -> None:
    """Put ``new`` in the place of ``target`` in one step where the system has one."""
    if not target.exists():
        os.rename(new, target)
    elif not _exchange(new, target):
        old = Path(tempfile.mkdtemp(prefix=_prefix(target), suffix=OLD, dir=target.parent))
        old.rmdir()  # Windows puts no folder in the place of another
        os.replace(target, old)
        try:
            os.rename(new, target)
        except OSError:
            os.replace(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders atomically: renameat2 on Linux, renamex_np on macOS; False without them."""
    if sys.platform == "win32":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(a), os.fsencode(b)
    if sys.platform.startswith("linux") and hasattr(libc, "renameat2"):
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return libc.renameat2(here, first, here, second, exchange) == 0
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return libc.renamex_np(first, second, 2) == 0  # RENAME_SWAP
    return False


def as_path(path: object) -> Path:
    """A path as users give it.

    Raises:
        LoRunError: what can't be one.
    """
    try:
        text = os.fspath(path)  # type: ignore[call-overload]
        os.fsencode(text)
        if not isinstance(text, str) or "\0" in text:
            raise ValueError("no text, or a zero byte")
    except (TypeError, ValueError) as error:
        raise LoRunError(f"expected a path, found {path!r}: give a str or a pathlib.Path") from error
    return Path(text)


def _reason(error: OSError) -> str:
    if isinstance(error, shutil.Error):
        return "files beside the network's that can't be copied"
    return error.strerror or str(error) or type(error).__name__


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask

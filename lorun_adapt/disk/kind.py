"""Tell what a file is by its content, where it is not what its name says."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import LoRunError

LFS_POINTER = b"version https://git-lfs.github.com"
HEAD = 512  # bytes to look at


@contextmanager
def reading(what: str, path: Path, advice: str) -> Iterator[None]:
    """Within the block a library reads ``path``; say in a sentence what is wrong with the file.

    Readers of damaged files raise errors of many kinds, often without the name of the file.

    >>> with reading("the image", Path("photo.png"), "remove the file"):
    ...     pass
    Traceback (most recent call last):
        ...
    lorun_adapt.errors.LoRunError: cannot read the image photo.png: FileNotFoundError: [Errno 2] No such file or \
directory: 'photo.png'; remove the file
    """
    try:
        check_is_data(path)
        yield
    except LoRunError:
        raise
    except Exception as error:
        raise LoRunError(f"cannot read {what} {path}: {type(error).__name__}: {error}; {advice}") from error


def check_is_data(path: Path) -> None:
    """Check that a file is not empty, a web page, a Git LFS pointer or an archive: what downloads often leave.

    Raises:
        LoRunError: it is one of these.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not head:
        problem, advice = "is empty (0 bytes)", "download it again"
    elif head.startswith(LFS_POINTER):
        problem, advice = "is a Git LFS pointer and not the file itself", "run `git lfs pull` in its repository"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        problem, advice = "is a web page", "download the file itself instead of the page that shows it"
    elif head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")):
        problem, advice = "is compressed", "unpack it, and give the file inside"
    elif head[257:262] == b"ustar":
        problem, advice = "is a tar archive", "unpack it, and give the file inside"
    elif head.startswith(b"PK") and not _is_of_torch(path):
        problem, advice = "is a zip archive", "unpack it, and give the file inside"
    else:
        return
    raise LoRunError(f"{path} {problem}: {advice}")


def _is_of_torch(path: Path) -> bool:
    """Whether a zip file is one of torch or NumPy, or damaged, so that its reader says more."""
    try:
        with zipfile.ZipFile(path) as file:
            names = file.namelist()
    except zipfile.BadZipFile:
        return True
    return any(name.endswith(("data.pkl", ".npy", "constants.pkl")) for name in names)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors does: the length of a header, and the header in JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size

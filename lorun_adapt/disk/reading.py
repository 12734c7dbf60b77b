"""Files from anyone: read once, within bounds, and checked before they are believed."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..errors import LoRunError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
PLAIN = re.compile(r"(\w[\w-]*(\.[\w-]+)*/)*\w[\w-]*(\.[\w-]+)*")  # names that no system takes for more than they are
LARGE = 1 << 26  # bytes to ask for at a time of a file that one call does not give whole
FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
METADATA = 65_536  # bytes of a header beside its tensors
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # a zip is torch.save's


class Slot(NamedTuple):
    """What a tensor in a file may be: sides (None for the rank) and dtype; floats may have any width."""

    shape: tuple[int | None, ...]
    dtype: torch.dtype

    def fits(self, shape: tuple[int, ...], dtype: torch.dtype, highest_rank: int) -> bool:
        floats = dtype.is_floating_point and self.dtype.is_floating_point
        return (
            (floats or dtype == self.dtype)
            and len(shape) == len(self.shape)
            and all(1 <= n <= highest_rank if side is None else n == side for n, side in zip(shape, self.shape))
        )


def read_file(folder: Path, name: str, limit: int, plain: set[str] | None = None) -> bytes:
    """The bytes of the file ``name`` within ``folder``.

    Args:
        plain: folders within it that were seen not to be links, to which this one's is added.

    Raises:
        LoRunError: no such file, one of more than ``limit`` bytes, one that isn't an ordinary
            file, or one outside the folder, through its name or a link.
    """
    path = f"{folder}{os.sep}{name}"
    if not _within(path, folder, name, set() if plain is None else plain):
        raise LoRunError(f"expected files within {folder}, found that {name!r} leads out of it: do not trust it")
    try:
        # A pipe by that name must not make the reader wait.
        handle = os.open(path, FLAGS)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(errno.EINVAL, "no ordinary file")
            content = _read_all(handle, found.st_size, limit) if found.st_size <= limit else b""
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise LoRunError(f"expected a file {path}, found {reason}: download the folder again") from error
    if found.st_size > limit or len(content) > limit:
        raise LoRunError(
            f"expected at most {limit:,} bytes, which this network can have, found {found.st_size:,} in {path}: it is "
            "for another network, or damaged"
        )
    return content


def _read_all(handle: int, size: int, limit: int) -> bytes:
    """What a file holds, of which no more than one byte beyond ``limit``, as it may grow meanwhile."""
    content = os.read(handle, size + 1)
    if len(content) == size:  # and no more
        return content
    parts, left = [content], limit + 1
    while (left := left - len(parts[-1])) > 0 and parts[-1]:
        parts.append(os.read(handle, min(left, LARGE)))
    return b"".join(parts)


def _within(path: str, folder: Path, name: str, plain: set[str]) -> bool:
    if PLAIN.fullmatch(name) and not _has_link(folder, name, plain):  # which is far quicker than to resolve both
        return True
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return False
    try:
        home, real = os.path.realpath(folder), os.path.realpath(path)
    except (OSError, ValueError):
        return True  # opening it says what is wrong
    if real.startswith(home.rstrip(os.sep) + os.sep):
        return True
    # In huggingface_hub's cache, files in snapshots/ are links to the repository's blobs/ beside it, and these may be
    # links to blobs/ab/ab12... of the whole cache.
    parts, blob = Path(home).parts, Path(real)
    repositories = [Path(*parts[:place]) for place, part in enumerate(parts) if part == "snapshots"]
    shared = re.fullmatch("[0-9a-f]{64}", blob.name) is not None and blob.parent.name == blob.name[:2]
    return any(
        blob.parent == repository / "blobs" or (shared and blob.parents[1] == repository.parent / "blobs")
        for repository in repositories
    )


def _has_link(folder: Path, name: str, plain: set[str]) -> bool:
    """Whether one of the parts of ``name`` is a link, or can't be told."""
    parts = name.split("/")
    try:
        for end in range(1, len(parts) + 1):
            part = "/".join(parts[:end])
            if part not in plain:
                if stat.S_ISLNK(os.lstat(f"{folder}{os.sep}{part}").st_mode):
                    return True
                if end < len(parts):
                    plain.add(part)
    except (OSError, ValueError):
        return True
    return False


def parse_json(content: bytes, where: str) -> Any:
    """What ``content`` holds, with finite numbers and no key twice.

    Raises:
        LoRunError: anything else.
    """
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_each_once, parse_float=_finite, parse_constant=_finite
        )
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise LoRunError(f"expected JSON, found damage in {where}: {reason}; download it again") from error


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def header_limit(slots: Mapping[str, Slot]) -> int:
    """Bytes of the largest safetensors header with these tensors."""
    return METADATA + sum(6 * len(name) + 200 + 22 * len(slot.shape) for name, slot in slots.items())


def file_limit(slots: Mapping[str, Slot], highest_rank: int = 1) -> int:
    """Bytes of the largest safetensors file with these tensors."""
    numel = sum(math.prod(highest_rank if side is None else side for side in slot.shape) for slot in slots.values())
    return 8 + header_limit(slots) + 8 * numel


def parse_tensors(
    content: bytes, slots: Mapping[str, Slot], where: str, highest_rank: int = 1
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file, some or all of ``slots``.

    Raises:
        LoRunError: damage, or a tensor that is no slot's; seen in the header, before any is made.
    """

    def fail(expected: str, found: str) -> LoRunError:
        return LoRunError(
            f"expected {expected}, found {found} in {where}: it is for another network, or damaged; download it again"
        )

    if len(content) < 8:
        raise fail("a safetensors file", f"{len(content)} bytes")
    (length,) = struct.unpack("<Q", content[:8])
    if length > len(content) - 8 and (content[:4] == PICKLES[0] or content[:2] in PICKLES):
        raise LoRunError(
            f"expected a safetensors file, found a pickle in {where}: pickles can run code and are never read; ask for "
            "the file as safetensors"
        )
    if length > (limit := min(len(content) - 8, header_limit(slots))):
        raise fail(f"a header of at most {limit:,} bytes", f"one that claims {length:,}")
    header = parse_json(content[8 : 8 + length], where)
    if not isinstance(header, dict):
        raise fail("a safetensors header", type(header).__name__)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fail("metadata of strings", "others")
    for name, entry in header.items():
        if name not in slots:
            raise fail("only the network's tensors", repr(name[:200]))
        kind, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        dtype = DTYPES.get(kind) if isinstance(kind, str) else None
        if dtype is None or not isinstance(shape, list) or not all(type(side) is int for side in shape):
            raise fail(f"a shape and a dtype for {name!r}", repr(entry)[:100])
        if not slots[name].fits(tuple(shape), dtype, highest_rank):
            sides = tuple("rank" if side is None else side for side in slots[name].shape)
            raise fail(f"{name!r} of shape {_shown(sides)} and {slots[name].dtype}", f"{_shown(shape)} and {dtype}")
    try:
        return load(content), metadata
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError, OverflowError, AssertionError) as error:
        raise fail("a safetensors file", f"damage ({str(error).splitlines()[0][:200]})") from error


def _shown(shape: Any) -> str:
    return f"({', '.join(map(str, shape))})"[:200]

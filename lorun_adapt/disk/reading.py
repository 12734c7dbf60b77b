"""Read files of unknown origin: once, up to a size, within their folder, and checked before they are used."""

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
from .eight_bits import SCALES, number_of_scales, unpack

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
# Names of files and folders without "..", or anything else that a system could read as more than a name.
SIMPLE_NAME = re.compile(r"(\w[\w-]*(\.[\w-]+)*/)*\w[\w-]*(\.[\w-]+)*")
BLOCK = 1 << 26  # bytes to ask for at a time of a file that one call does not return whole
FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
METADATA = 65_536  # bytes that a header may have besides its tensors' entries
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save writes a zip file


class Slot(NamedTuple):
    """The shape and dtype that a tensor in a file must have.

    A side of None is the rank, which may be anything up to a highest one; a floating-point dtype stands for all.

    >>> Slot((None, 8), torch.float32).fits((2, 8), torch.float16, highest_rank=4)
    True
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype

    def fits(self, shape: tuple[int, ...], dtype: torch.dtype, highest_rank: int) -> bool:
        """Whether a tensor of this shape and dtype may be in the slot."""
        floats = dtype.is_floating_point and self.dtype.is_floating_point
        return (
            (floats or dtype == self.dtype)
            and len(shape) == len(self.shape)
            and all(1 <= n <= highest_rank if side is None else n == side for n, side in zip(shape, self.shape))
        )


def read_file(folder: Path, name: str, limit: int, real_folders: set[str] | None = None) -> bytes:
    """Return the bytes of the file ``name`` within ``folder``.

    Args:
        folder: the folder; the file must be in it or in a folder within it.
        name: the file's path relative to ``folder``.
        limit: the most bytes that the file may have.
        real_folders: paths of folders within ``folder`` known not to be links, to which those on the way to the file
            are added, so that reading many files need not look at them again.

    Raises:
        LoRunError: there is no such file, it has more than ``limit`` bytes, it is not a regular file, or it is
            outside the folder, through its name or a link.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as here:
    ...     _ = (Path(here) / "config.json").write_text("{}")
    ...     read_file(Path(here), "config.json", limit=100)
    b'{}'
    """
    path = f"{folder}{os.sep}{name}"
    if not _is_within(path, folder, name, set() if real_folders is None else real_folders):
        raise LoRunError(f"{name!r} leads out of {folder}, through its name or a link: do not load this folder")
    try:
        handle = os.open(path, FLAGS)  # without blocking, as it may be a pipe
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            content = _read_all(handle, status.st_size, limit) if status.st_size <= limit else b""
        finally:
            os.close(handle)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise LoRunError(f"cannot read {path}: {reason}; download the folder again") from error
    if status.st_size > limit or len(content) > limit:
        raise LoRunError(
            f"expected at most {limit:,} bytes for this network, found {status.st_size:,} in {path}: the file is for "
            "another network, or damaged; download it again"
        )
    return content


def _read_all(handle: int, size: int, limit: int) -> bytes:
    """Read a file of ``size`` bytes to its end, but at most one byte beyond ``limit``, as it may grow meanwhile."""
    content = os.read(handle, size + 1)
    if len(content) == size:
        return content
    parts, left = [content], limit + 1
    while (left := left - len(parts[-1])) > 0 and parts[-1]:
        parts.append(os.read(handle, min(left, BLOCK)))
    return b"".join(parts)


def _is_within(path: str, folder: Path, name: str, real_folders: set[str]) -> bool:
    if SIMPLE_NAME.fullmatch(name) and not _has_link(folder, name, real_folders):  # far faster than resolving both
        return True
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return False
    try:
        root, real = os.path.realpath(folder), os.path.realpath(path)
    except (OSError, ValueError):
        return True  # opening the file will say what is wrong
    if real.startswith(root.rstrip(os.sep) + os.sep):
        return True
    # In huggingface_hub's cache, files in a repository's snapshots/ are links to its blobs/, which in turn may be links
    # to blobs/ab/ab12... of the whole cache.
    parts, blob = Path(root).parts, Path(real)
    repositories = [Path(*parts[:end]) for end, part in enumerate(parts) if part == "snapshots"]
    shared = re.fullmatch("[0-9a-f]{64}", blob.name) is not None and blob.parent.name == blob.name[:2]
    return any(
        blob.parent == repository / "blobs" or (shared and blob.parents[1] == repository.parent / "blobs")
        for repository in repositories
    )


def _has_link(folder: Path, name: str, real_folders: set[str]) -> bool:
    """Whether one of the parts of ``name`` is a link, or cannot be looked at."""
    parts = name.split("/")
    try:
        for end in range(1, len(parts) + 1):
            part = "/".join(parts[:end])
            if part not in real_folders:
                if stat.S_ISLNK(os.lstat(f"{folder}{os.sep}{part}").st_mode):
                    return True
                if end < len(parts):
                    real_folders.add(part)
    except (OSError, ValueError):
        return True
    return False


def parse_json(content: bytes, where: str) -> Any:
    """Return the value that the JSON text ``content`` holds; ``where`` names the file in messages.

    Raises:
        LoRunError: it is not JSON in UTF-8, a key appears twice in an object, or a number is not finite.

    >>> parse_json(b'{"r": 2}', "adapter_config.json")
    {'r': 2}
    """
    try:
        return json.loads(
            content.decode("utf-8"), object_pairs_hook=_unique_keys, parse_float=_finite, parse_constant=_finite
        )
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise LoRunError(f"{where} is not valid JSON: {reason}; download it again") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key appears twice")
    return result


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def header_limit(slots: Mapping[str, Slot]) -> int:
    """Return the most bytes that a safetensors header with these tensors may have."""
    return METADATA + sum(6 * len(name) + 200 + 22 * len(slot.shape) for name, slot in slots.items())


def file_limit(slots: Mapping[str, Slot], highest_rank: int = 1) -> int:
    """Return the most bytes that a safetensors file with these tensors, of up to ``highest_rank``, may have."""
    numel = sum(math.prod(highest_rank if side is None else side for side in slot.shape) for slot in slots.values())
    return 8 + header_limit(slots) + 8 * numel


def parse_tensors(
    content: bytes, slots: Mapping[str, Slot], where: str, highest_rank: int = 1
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file; tensors in eight bits are returned as float32.

    Args:
        content: the file's bytes.
        slots: by name, the tensors that the file may hold; it need not hold all.
        where: the file's name, for messages.
        highest_rank: the most that a side of None in a slot may be.

    Raises:
        LoRunError: the file is damaged or a pickle, or its header names a tensor that fits no slot. The header is
            checked before any tensor is made.

    >>> from safetensors.torch import save
    >>> content = save({"step": torch.ones(1)}, {"format": "pt"})
    >>> parse_tensors(content, {"step": Slot((1,), torch.float32)}, "base.safetensors")
    ({'step': tensor([1.])}, {'format': 'pt'})
    """

    def error_of(expected: str, found: str) -> LoRunError:
        return LoRunError(
            f"expected {expected}, found {found} in {where}: the file is for another network, or damaged; download it "
            "again"
        )

    if len(content) < 8:
        raise error_of("a safetensors file", f"{len(content)} bytes")
    (length,) = struct.unpack("<Q", content[:8])
    if length > len(content) - 8 and content.startswith(PICKLES):
        raise LoRunError(
            f"expected a safetensors file, found a pickle in {where}: pickles can run code and are never read; ask for "
            "the file as safetensors"
        )
    if length > (limit := min(len(content) - 8, header_limit(slots))):
        raise error_of(f"a header of at most {limit:,} bytes", f"one that claims {length:,}")
    header = parse_json(content[8 : 8 + length], where)
    if not isinstance(header, dict):
        raise error_of("a safetensors header", type(header).__name__)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise error_of("metadata of strings", "other values")
    entries: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, entry in header.items():
        if name not in slots and name != SCALES:
            raise error_of("only the network's tensors", repr(name[:200]))
        kind, shape = (entry.get("dtype"), entry.get("shape")) if isinstance(entry, dict) else (None, None)
        dtype = DTYPES.get(kind) if isinstance(kind, str) else None
        if dtype is None or not isinstance(shape, list) or not all(type(side) is int for side in shape):
            raise error_of(f"a shape and a dtype for {name!r}", repr(entry)[:100])
        entries[name] = tuple(shape), dtype
    packed = {
        name: shape
        for name, (shape, dtype) in (entries.items() if SCALES in entries else ())
        if name in slots and dtype == torch.int8 and slots[name].dtype.is_floating_point and len(shape) > 1
    }
    allowed = {**slots, SCALES: Slot((number_of_scales(packed),), torch.bfloat16)} if packed else slots
    for name, (shape, dtype) in entries.items():
        slot = allowed.get(name)
        if slot is None:
            raise error_of("tensors in eight bits and their scales", repr(name))
        if not slot.fits(shape, torch.float32 if name in packed else dtype, highest_rank):
            sides = tuple("rank" if side is None else side for side in slot.shape)
            raise error_of(f"{name!r} of shape {_as_text(sides)} and {slot.dtype}", f"{_as_text(shape)} and {dtype}")
    try:
        return unpack(load(content), packed), metadata
    except (SafetensorError, ValueError, RuntimeError, KeyError, TypeError, OverflowError, AssertionError) as error:
        raise error_of("a safetensors file", f"damage ({str(error).splitlines()[0][:200]})") from error


def _as_text(shape: Any) -> str:
    return f"({', '.join(map(str, shape))})"[:200]

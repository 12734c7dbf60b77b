"""Restore images, and write them as files."""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tifffile
import torch
from PIL import Image
from torch import Tensor, nn

from ..disk.folder import write_file
from ..errors import LoRunError
from ..util.nested import device_of, to_device
from ..util.progress import progress
from ..util.threads import helpful_threads, try_threads_again
from .arrays import ARRAY_SUFFIXES, read_arrays
from .images import depth_of
from .task import Task
from .tiles import in_tiles

OVERLAP = 16  # pixels
SINGLE = {torch.float64: torch.float32, torch.complex128: torch.complex64}  # what networks take for double precision


def restore(
    task: Task, net: nn.Module, images: Tensor, sigma: float = 0.0, tile: int | None = None, overlap: int = OVERLAP
) -> Tensor:
    """Measure images, and restore them from the measurements.

    Args:
        task: measures, and gets the images from the network's output.
        net: the network, or its conversion.
        images: (B, C, H, W), in [0, 1].
        sigma: noise on the measurements (0..255).
        tile: restore in tiles of so many pixels a side, for images that are too large for the memory.
        overlap: of the tiles, in pixels; what the network sees around a pixel should fit in it.

    Returns:
        The restored images, (B, C, H, W), float32, on the CPU.

    Raises:
        LoRunError: a function of the task fails; tiles for a network that the task does not call local.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> task = SimpleNamespace(
    ...     tile=1,
    ...     measure=lambda images, sigma: (images + 0.1,),
    ...     run=lambda net, arguments, images: net(*arguments) - 0.1,
    ... )
    >>> images = torch.rand(1, 1, 20, 30)
    >>> torch.allclose(restore(task, nn.Identity(), images, tile=8, overlap=2), images)
    True
    """
    if images.ndim != 4:
        raise LoRunError(f"expected images (B, C, H, W), found {tuple(images.shape)}: add the dimensions that it lacks")
    device, images = device_of(net), images.float().cpu()

    def whole(part: Tensor) -> Tensor:
        return task.run(net, to_device(task.measure(part, sigma), device), part)

    if tile is None:
        return whole(images)
    if task.tile is None:
        raise LoRunError(
            f"{task.name} does not say that its network is local, so tiles would give other images: set tile = 1 in "
            "it, or the side of the blocks that the network works on"
        )
    return in_tiles(images, whole, tile, overlap, task.tile)


def restore_files(
    task: Task,
    net: nn.Module,
    files: Sequence[Path],
    out: Path,
    *,
    sigma: float = 0.0,
    tile: int | None = None,
    overlap: int = OVERLAP,
    overwrite: bool = False,
) -> list[Path]:
    """Restore image files, and write each under its name: as TIFF if it is one, otherwise as PNG.

    The depth is that of the input: 8 or 16 bits, or floats. Colours of more than 8 bits are written as TIFF. Images
    that the task's own ``read`` returns are written with 8 bits. Images with neither 1 nor 3 channels are written as
    float32 in ``.npy``.

    Args:
        files: the images.
        out: the folder to write to; it is made if there is none.
        overwrite: replace files that are there.
        task, net, sigma, tile, overlap: as in :func:`restore`.

    Returns:
        The files written.

    Raises:
        LoRunError: a file is there already, or two would have one name, and nothing is written then; as
            :func:`restore`.
    """
    plain = task.reads_itself or task.channels not in (1, 3)
    depths = [np.dtype(np.uint8) if plain else depth_of(path) for path in files]
    written = [out / f"{path.stem}{_suffix(task, path, depth)}" for path, depth in zip(files, depths)]
    _check_written(written, files, overwrite)
    with helpful_threads():
        for target, path, depth in zip(progress(written, "restoring", "image", delay=2, leave=False), files, depths):
            try_threads_again()
            restored = restore(task, net, task.read(path)[None], sigma, tile, overlap)[0]
            _check_finite(restored, path)
            write_file(target, functools.partial(_write, image=restored, suffix=target.suffix, depth=depth))
    return written


def measurement_files(path: Path) -> list[Path]:
    """Return a file of measurements in a list, or those in a folder, sorted by name.

    Raises:
        LoRunError: there is no such file or folder, or none in it.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise LoRunError(f"no measurements at {path}: give a file or a folder")
    files = sorted(p for p in path.iterdir() if p.is_file() and p.suffix.lower() in ARRAY_SUFFIXES)
    if not files:
        raise LoRunError(f"no measurements in {path}: give a folder with files such as .npy or .mat")
    return files


def restore_measurements(
    task: Task, net: nn.Module, names: Mapping[str, bool], files: Sequence[Path], out: Path, *, overwrite: bool = False
) -> list[Path]:
    """Restore images from files of measurements, and write each with 16 bits, or as ``.npy`` if it is a cube.

    Args:
        names: the arguments that the forward of the original network takes by position, each with whether it must have
            it. They are the arrays of these names in each file, or what ``arguments(arrays)`` of the task returns.
        files: ``.npy``, ``.npz``, ``.mat`` or HDF5 files.
        task, net, out, overwrite: as in :func:`restore_files`.

    Returns:
        The files written.

    Raises:
        LoRunError: as :func:`restore_files`; an argument is in no array, or an array is no argument.
    """
    depth = np.dtype(np.uint16)
    suffix = {1: ".png", 3: ".tif"}.get(task.channels, ".npy")
    written = [out / f"{path.stem}{suffix}" for path in files]
    _check_written(written, files, overwrite)
    with helpful_threads():
        for target, path in zip(progress(written, "restoring", "image", delay=2, leave=False), files):
            try_threads_again()
            arguments = _arguments(task, names, path)
            image = task.image_in(task.run_forward(net, to_device(arguments, device_of(net))))
            _check_finite(image, path)
            write_file(target, functools.partial(_write, image=image, suffix=suffix, depth=depth))
    return written


def _arguments(task: Task, names: Mapping[str, bool], path: Path) -> tuple[Any, ...]:
    """The arguments of a forward, from the arrays of a file."""
    arrays = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in read_arrays(path).items()}
    arrays = {name: array.to(SINGLE.get(array.dtype, array.dtype)) for name, array in arrays.items()}
    if task.arguments is not None:
        return task.arguments(arrays)
    if len(arrays) == sum(names.values()) == 1:
        return tuple(arrays.values())
    given = [name for name in names if name in arrays]
    missing = [name for name, required in names.items() if required and name not in arrays]
    if missing or len(given) < len(arrays) or given != list(names)[: len(given)]:
        raise LoRunError(
            f"the network's forward takes {', '.join(names)}, and {path} has {', '.join(arrays) or 'no array'}: name "
            "the arrays like the first arguments, or define arguments(arrays) in the task"
        )
    return tuple(arrays[name] for name in given)


def _check_finite(image: Tensor, path: Path) -> None:
    if not image.isfinite().all():
        raise LoRunError(
            f"the network returned NaN or Inf for {path}, so no image is written: check its weights, and that the "
            "measurements are those it was trained for"
        )


def _check_written(written: Sequence[Path], files: Sequence[Path], overwrite: bool) -> None:
    for target, path in zip(written, files):
        if written.count(target) > 1:
            raise LoRunError(f"several images would be written to {target}, {path} among them: rename one")
        if target.resolve() == path.resolve():
            raise LoRunError(f"{target} is an image to restore: give another folder")
        if target.exists() and not overwrite:
            raise LoRunError(f"{target} is there already: give another folder, or pass --overwrite")


def _suffix(task: Task, path: Path, depth: np.dtype) -> str:
    if task.channels not in (1, 3):
        return ".npy"
    if path.suffix.lower() in (".tif", ".tiff") and not task.reads_itself:
        return path.suffix
    return ".tif" if depth.kind == "f" or (depth != np.uint8 and task.channels == 3) else ".png"


def _write(file: BinaryIO, image: Tensor, suffix: str, depth: np.dtype) -> None:
    """Write an image (C, H, W), clipped to [0, 1] unless it goes to ``.npy``."""
    if suffix == ".npy":
        np.save(file, image.numpy(), allow_pickle=False)
        return
    values = image.clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()
    pixels = values if depth.kind == "f" else np.rint(values * np.iinfo(depth).max).astype(depth)
    buffer = io.BytesIO()  # tifffile takes no file without a name
    if suffix == ".png":
        Image.fromarray(pixels).save(buffer, format="PNG")
    else:
        tifffile.imwrite(buffer, pixels, photometric="minisblack" if pixels.ndim == 2 else "rgb")
    file.write(buffer.getvalue())

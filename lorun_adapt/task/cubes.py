"""Read cubes, images of many channels, from the files in which they are published."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import Tensor

from ..disk.kind import reading
from ..errors import LoRunError
from .arrays import ARRAY_SUFFIXES, read_arrays
from .images import OTHERWISE, between_0_and_1

CUBE_SUFFIXES = ARRAY_SUFFIXES | {".tif", ".tiff"}


def read_cube(path: Path, channels: int) -> Tensor:
    """Read a cube as a tensor (C, H, W), float32 in [0, 1], from an array file or a TIFF file with a page a channel.

    The channels may be the last or the first axis; integers are divided by the largest one of 8 or 16 bits.

    Raises:
        LoRunError: the file cannot be read, or not exactly one array in it has so many channels; values beyond 0 and 1.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as here:
    ...     np.save(Path(here) / "cube.npy", np.ones((16, 20, 28), np.float32))
    ...     read_cube(Path(here) / "cube.npy", 28).shape
    torch.Size([28, 16, 20])
    """
    if path.suffix.lower() in (".tif", ".tiff"):
        with reading("the pages of", path, "download it again"):
            arrays = {"pages": tifffile.imread(path)}
    else:
        arrays = read_arrays(path)
    cubes = [array for array in arrays.values() if array.ndim == 3 and channels in (array.shape[0], array.shape[-1])]
    if len(cubes) != 1:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise LoRunError(
            f"expected one array with {channels} channels in {path}, found {shapes or 'no array'}: keep one such array "
            f"in each file, {OTHERWISE}"
        )
    cube = np.moveaxis(cubes[0], -1, 0) if cubes[0].shape[-1] == channels else cubes[0]
    return torch.from_numpy(np.ascontiguousarray(between_0_and_1(cube, path)))

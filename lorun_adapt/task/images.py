"""Image files, and reading them as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from ..errors import LoRunError

IMAGE_SUFFIXES = {".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


def read_image(path: Path, channels: int) -> Tensor:
    """Read an image file as a tensor of shape (C, H, W), float32 in [0, 1]; ``channels`` is 1 or 3.

    Raises:
        LoRunError: the file is missing, or no image.
    """
    try:
        with Image.open(path) as image:
            return image_tensor(image, channels)
    except (UnidentifiedImageError, OSError) as error:
        raise LoRunError(
            f"cannot read the image {path}: {error}; remove the file, or define read(path) in the task"
        ) from error


def image_tensor(image: Image.Image, channels: int) -> Tensor:
    """Return ``image`` as a tensor of shape (C, H, W), float32 in [0, 1]; 16-bit grey images keep their depth.

    >>> image_tensor(Image.new("L", (4, 3), 255), channels=1).shape
    torch.Size([1, 3, 4])
    """
    if image.mode[0] == "I" and channels == 1:  # mode I;16, or I where Pillow reads 16 bits into 32
        return torch.from_numpy(np.asarray(image).astype(np.float32))[None] / 65535
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1).contiguous()

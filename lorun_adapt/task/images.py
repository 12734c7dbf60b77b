"""Image files, and reading them as tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..disk.kind import reading
from ..errors import LoRunError

IMAGE_SUFFIXES = {".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how such files begin
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
OTHERWISE = "or define read(path) in the task"


def read_image(path: Path, channels: int) -> Tensor:
    """Read an image file as a tensor of shape (C, H, W), float32 in [0, 1].

    Integers are divided by the largest value of 1, 8 or 16 bits; floats must be in [0, 1]. A grey image read with 3
    channels has three equal channels; a colour image read with 1 channel becomes its luminance.

    Args:
        path: a file that Pillow or tifffile reads.
        channels: 1 or 3.

    Raises:
        LoRunError: the file is missing, damaged or not an image; it has several pages, transparent parts, 32-bit
            integers, floats outside [0, 1], or 16-bit colours in a format other than TIFF (Pillow would reduce these
            to 8 bits).
    """
    pixels = _pixels(path, channels)
    image = torch.from_numpy(between_0_and_1(pixels, path)).reshape(*pixels.shape[:2], -1).permute(2, 0, 1)
    if image.shape[0] == channels:
        return image.contiguous()
    if image.shape[0] not in (1, 3):
        raise LoRunError(f"{path} has {image.shape[0]} channels: save 1 or 3, {OTHERWISE}")
    return image.expand(3, -1, -1) if channels == 3 else torch.tensordot(torch.tensor(LUMINANCE), image, 1)[None]


def depth_of(path: Path) -> np.dtype:
    """Return the type of the values in an image file that :func:`read_image` reads: uint8, uint16 or float32."""
    dtype = _pixels(path, 3).dtype
    return np.dtype(np.float32) if dtype.kind == "f" else dtype


def _pixels(path: Path, channels: int) -> np.ndarray:
    with reading("the image", path, f"remove the file, {OTHERWISE}"):
        pixels = _with_tifffile(path) if _is_deep_tiff(path) else _with_pillow(path, channels)
        if not pixels.size or pixels.ndim not in (2, 3):
            raise ValueError(f"its shape is {pixels.shape}")
    return pixels


def _with_pillow(path: Path, channels: int) -> np.ndarray:
    with Image.open(path) as image:
        if image.format != "MPO":  # a photograph, with a preview of itself
            _check_pages(getattr(image, "n_frames", 1), path)
        if _is_deep_colour(path, image):
            raise LoRunError(
                f"{path} has 16-bit colours, but this format can only be read at 8 bits: save it as TIFF, {OTHERWISE}"
            )
        if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
            raise _transparent(path)
        if image.mode[0] == "I" and image.format in ("PNG", "PPM", "TIFF"):  # 16 bits, also where they are kept in 32
            deep = np.asarray(image).astype(np.uint16)
            inverted = image.format == "TIFF" and image.tag_v2.get(262) == 0  # type: ignore[attr-defined]
            return 65535 - deep if inverted else deep
        if image.mode in ("I", "F"):
            return np.array(image)
        upright = ImageOps.exif_transpose(image)
        return np.asarray(upright.convert("L" if channels == 1 else "RGB"))


def _is_deep_colour(path: Path, image: Image.Image) -> bool:
    """Whether a PNG or PPM file, just opened, has more than one value of 16 bits a pixel."""
    if image.format == "PNG":
        with path.open("rb") as file:
            head = file.read(26)
        return head[24] == 16 and head[25] != 0  # the depth, and the kind: 0 is grey
    arguments = image.tile[0][3] if image.format == "PPM" and image.mode != "I" and image.tile else ()  # type: ignore[attr-defined]
    return isinstance(arguments, tuple) and any(isinstance(item, int) and item > 255 for item in arguments)


def _is_deep_tiff(path: Path) -> bool:
    """Whether it is a TIFF file with more than 8 bits a value, other than grey integers of 16 bits."""
    with path.open("rb") as file:
        if file.read(4) not in TIFF:
            return False
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        grey16 = page.samplesperpixel == 1 and page.dtype == np.uint16 and page.bitspersample == 16
        return page.bitspersample > 8 and not grey16


def _with_tifffile(path: Path) -> np.ndarray:
    with tifffile.TiffFile(path) as file:
        _check_pages(len(file.pages), path)
        page = file.pages.first
        if page.bitspersample % 8:
            raise LoRunError(f"{path} has values of {page.bitspersample} bits: save it with 8 or 16, {OTHERWISE}")
        try:
            pixels = page.asarray()
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            if page.samplesperpixel == 1 and page.dtype == np.float32:
                with Image.open(path) as image:
                    return np.array(image)
            kind = tifffile.COMPRESSION(page.compression).name
            raise LoRunError(
                f"{path} is compressed ({kind}): install imagecodecs, save it without compression, {OTHERWISE}"
            ) from error
        pixels = np.moveaxis(pixels, 0, -1) if page.axes.startswith("S") else pixels
        if page.extrasamples:
            alpha = pixels[..., -1]
            if (alpha < (1 if alpha.dtype.kind == "f" else np.iinfo(alpha.dtype).max)).any():
                raise _transparent(path)
            pixels = pixels[..., :-1]
        return pixels


def between_0_and_1(pixels: np.ndarray, path: Path) -> np.ndarray:
    """Return values as float32 in [0, 1]: integers divided by the largest one of 8 or 16 bits, floats as they are.

    Raises:
        LoRunError: floats beyond 0 and 1, or other integers.
    """
    if pixels.dtype in (np.uint8, np.uint16):
        return pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
    if pixels.dtype.kind != "f":
        raise LoRunError(
            f"{path} has {pixels.dtype} values with no known maximum: save it with 8 or 16 bits, {OTHERWISE}"
        )
    check_range(pixels, str(path), f"save it divided by its largest value, {OTHERWISE}")
    return pixels.astype(np.float32)


def check_range(values: np.ndarray | Tensor, where: str, advice: str) -> None:
    """Check that all values are in [0, 1].

    Args:
        values: floats.
        where: what holds them, for the message.
        advice: what to do, for the message.

    Raises:
        LoRunError: some are not, or are NaN.
    """
    least, most = float(values.min()), float(values.max())
    if not (-1e-6 <= least and most <= 1 + 1e-6):
        raise LoRunError(f"expected values from 0 to 1 in {where}, found {least:.4g} to {most:.4g}: {advice}")


def _check_pages(count: int, path: Path) -> None:
    if count > 1:
        raise LoRunError(f"{path} has {count} pages: save each in a file of its own, {OTHERWISE}")


def _transparent(path: Path) -> LoRunError:
    return LoRunError(f"{path} has transparent parts: save it on a background, {OTHERWISE}")

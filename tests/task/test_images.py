"""Image files of every mode, and files that hold no image."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from tasks import COLOUR_TASK

from lorun_adapt import LoRunError
from lorun_adapt.task.images import LUMINANCE, read_image
from lorun_adapt.task.task import load_task

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], -1)
DEEP = (GREY.astype(np.uint16) << 8) + 77
DEEP_COLOUR = (COLOUR.astype(np.uint16) << 8) + 77


def png(depth: int, kind: int, rows: np.ndarray) -> bytes:
    """A PNG file of 16 bits a value, which Pillow cannot write for colours."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = rows.shape[:2]
    data = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def saved(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)
    return buffer.getvalue()


def tiff(array: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def pillow(array: np.ndarray, mode: str | None = None, form: str = "PNG", **options: Any) -> bytes:
    image = Image.fromarray(array)
    return saved(image.convert(mode) if mode else image, format=form, **options)


def grey12() -> bytes:
    """A TIFF file of 12 bits a value, all of them at their largest."""
    content = bytearray(tiff(np.full((6, 8), 65535, np.uint16)))
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        place = file.pages.first.tags["BitsPerSample"].valueoffset
    content[place] = 12
    return bytes(content)


OPAQUE = np.full_like(GREY, 255)
RIGHT = {  # file -> values in [0, 1]
    "grey.png": (pillow(GREY), GREY / 255),
    "grey16.png": (pillow(DEEP), DEEP / 65535),
    "grey16.tif": (pillow(DEEP, form="TIFF"), DEEP / 65535),
    "grey16_lzw.tif": (pillow(DEEP, form="TIFF", compression="tiff_lzw"), DEEP / 65535),
    "grey16_white.tif": (tiff(65535 - DEEP, photometric="miniswhite"), DEEP / 65535),
    "grey16_big_endian.tif": (tiff(DEEP, byteorder=">"), DEEP / 65535),
    "grey16.pgm": (b"P5\n8 6\n65535\n" + DEEP.astype(">u2").tobytes(), DEEP / 65535),
    "bits.png": (pillow(GREY > 99), (GREY > 99) * 1.0),
    "bits.tif": (pillow(GREY > 99, form="TIFF"), (GREY > 99) * 1.0),
    "float.tif": (tiff((GREY / 255).astype(np.float32)), GREY / 255),
    "double.tif": (tiff(GREY / 255), GREY / 255),
    "opaque_grey.png": (pillow(np.stack([GREY, OPAQUE], -1)), GREY / 255),
    "colour.png": (pillow(COLOUR), COLOUR / 255),
    "colour.tif": (pillow(COLOUR, form="TIFF"), COLOUR / 255),
    "colour.ppm": (pillow(COLOUR, form="PPM"), COLOUR / 255),
    "opaque.png": (pillow(np.dstack([COLOUR, OPAQUE])), COLOUR / 255),
    "colour16.tif": (tiff(DEEP_COLOUR), DEEP_COLOUR / 65535),
    "colour16_planes.tif": (
        tiff(np.moveaxis(DEEP_COLOUR, -1, 0), photometric="rgb", planarconfig="separate"),
        DEEP_COLOUR / 65535,
    ),
    "colour16_opaque.tif": (
        tiff(np.dstack([DEEP_COLOUR, OPAQUE.astype(np.uint16) * 257]), photometric="rgb", extrasamples=["unassalpha"]),
        DEEP_COLOUR / 65535,
    ),
    "colour_float.tif": (tiff((COLOUR / 255).astype(np.float32), photometric="rgb"), COLOUR / 255),
    "palette.png": (pillow(GREY, "P"), GREY / 255),
    "float_lzw.tif": (
        saved(Image.fromarray((GREY / 255).astype(np.float32)), format="TIFF", compression="tiff_lzw"),
        GREY / 255,
    ),
    "inks.tif": (pillow(COLOUR, "CMYK", "TIFF"), COLOUR / 255),
}


def test_photographs_of_cameras_stand_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter turn clockwise
    Image.fromarray(GREY).save(tmp_path / "phone.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "phone.png", 1)[0], torch.from_numpy(np.rot90(GREY, -1) / np.float32(255)))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", RIGHT)
def test_every_mode_has_its_values(tmp_path: Path, name: str, channels: int) -> None:
    content, values = RIGHT[name]
    (tmp_path / name).write_bytes(content)
    image = read_image(tmp_path / name, channels)
    if values.ndim == 2:
        expected = np.broadcast_to(values, (channels, *values.shape))
    else:
        expected = np.moveaxis(values, -1, 0) if channels == 3 else (values @ LUMINANCE)[None]
    assert image.shape == expected.shape and image.dtype == torch.float32 and image.is_contiguous() or channels == 3
    rounded = values.ndim == 3 and channels == 1  # Pillow rounds the luminance of 8 bits
    assert np.abs(image.numpy() - expected).max() < (0.5 / 255 + 1e-6 if rounded else 1e-6)


WRONG = {
    "deep.png": (png(16, 2, DEEP_COLOUR), "16-bit colours.*save it as TIFF"),
    "deep_alpha.png": (png(16, 6, np.dstack([DEEP_COLOUR, DEEP])), "16-bit colours"),
    "deep.ppm": (b"P6\n8 6\n65535\n" + DEEP_COLOUR.astype(">u2").tobytes(), "16-bit colours"),
    "alpha.png": (pillow(np.dstack([COLOUR, GREY])), "has transparent parts: save it on a background"),
    "alpha_grey.png": (pillow(np.stack([GREY, GREY], -1)), "has transparent parts"),
    "alpha16.tif": (
        tiff(np.dstack([DEEP_COLOUR, DEEP]), photometric="rgb", extrasamples=["unassalpha"]),
        "has transparent parts",
    ),
    "palette.png": (pillow(GREY, "P", transparency=0), "has transparent parts"),
    "pages.tif": (tiff(np.stack([GREY] * 3), photometric="minisblack"), "has 3 pages: save each in a file"),
    "pages16.tif": (tiff(np.stack([DEEP_COLOUR] * 2), photometric="rgb"), "has 2 pages"),
    "animated.png": (
        pillow(GREY, save_all=True, append_images=[Image.fromarray(GREY[::-1])]),
        "has 2 pages",
    ),
    "int32.tif": (tiff(DEEP.astype(np.int32) - 9999), "int32 values with no known maximum"),
    "uint32.tif": (tiff(DEEP.astype(np.uint32) * 60000), "uint32 values"),
    "int16.tif": (tiff(DEEP.astype(np.int16)), "int16 values"),
    "grey12.tif": (grey12(), "values of 12 bits: save it with 8 or 16"),
    "float.tif": (tiff(GREY.astype(np.float32)), "found 0 to 235: save it divided by"),
    "nan.tif": (tiff(np.full((4, 4), np.nan, np.float32)), "found nan to nan"),
    "empty.png": (b"", r"is empty \(0 bytes\)"),
    "page.png": (b"<!DOCTYPE html>", "is a web page"),
    "text.png": (b"not an image", "cannot read the image"),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", WRONG)
def test_what_has_no_value_is_an_error(tmp_path: Path, name: str, channels: int) -> None:
    content, message = WRONG[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LoRunError, match=f"(?s){name}.*{message}|{message}.*{name}"):
        read_image(tmp_path / name, channels)


def test_a_bomb(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "bomb.png").write_bytes(pillow(GREY))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    with pytest.raises(LoRunError, match="bomb.png: DecompressionBombError"):
        read_image(tmp_path / "bomb.png", 1)


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_end_with_a_sentence(tmp_path: Path) -> None:
    generator, refused = random.Random(0), 0
    whole = [content for content, _ in RIGHT.values()] + [pillow(COLOUR, form=form) for form in ("JPEG", "WEBP", "BMP")]
    for number in range(600):
        content = bytearray(generator.choice(whole))
        for _ in range(generator.randrange(1, 8)):
            content[generator.randrange(len(content))] = generator.randrange(256)
        path = tmp_path / f"{number}.tif"
        path.write_bytes(content[: generator.choice([len(content), generator.randrange(len(content))])])
        try:
            read_image(path, generator.choice([1, 3]))
        except LoRunError as error:
            refused += 1
            assert path.name in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    "body, message",
    [
        ("return 255 * torch.rand(3, 8, 8)", r"values from 0 to 1 in what read\(\) of .* returns for .*x.npy, found"),
        ("return torch.full((3, 8, 8), float('nan'))", "found nan to nan"),
        ("return {}['key']", r"read\(\) of .* for .*x.npy failed with KeyError"),
    ],
)
def test_a_read_of_the_tasks_own(tmp_path: Path, body: str, message: str) -> None:
    (tmp_path / "task.py").write_text(COLOUR_TASK + f"\nimport torch\n\ndef read(path):\n    {body}\n")
    with pytest.raises(LoRunError, match=message):
        load_task(tmp_path / "task.py").read(tmp_path / "x.npy")

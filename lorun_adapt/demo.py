"""The embedded example: convert the reference network and restore a photograph with both."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from skimage.data import camera
from torch import Tensor

from .conversion import convert
from .errors import LoRunError
from .evaluate import psnr, ssim
from .folder import write_file
from .model import LoRunModel
from .nested import to_device
from .tables import kilobytes, table
from .task import load_task

ERROR_GAIN = 8  # how much brighter the error maps are than the errors
PANEL = 384
CAPTION = 26


def run_demo(out: Path, rank: int, device: torch.device) -> tuple[LoRunModel, list[Table], Path]:
    """Convert the reference network, restore, and write ``demo.png`` into ``out``."""
    task = load_task(str(reference_task()))
    net = task.build()
    task.load_weights(net, None)
    net.to(device)
    lorun = convert(net, rank=rank, example_inputs=to_device(task.example_inputs(), device))
    truth = torch.from_numpy(camera()).float()[None, None] / 255
    arguments = task.measure(truth)
    estimate = task.module.restore(task.module.first_estimate(*arguments), truth)
    images = {
        "input estimate": estimate,
        "original": task.run(net, to_device(arguments, device), truth),
        f"converted, rank {rank}": task.run(lorun, to_device(arguments, device), truth),
    }
    report = lorun.report()
    sizes = {"original": report.network_before, f"converted, rank {rank}": report.network_after}
    rows = []
    for name, image in images.items():
        size = (f"{sizes[name].parameters:,}", kilobytes(sizes[name].bytes)) if name in sizes else ("-", "-")
        rows.append((name, *size, f"{psnr(image[0], truth[0]):.2f}", f"{ssim(image[0], truth[0]):.4f}"))
    result = table(
        "compressive sensing of one photograph at 25 %", ("", "parameters>", "bytes>", "PSNR (dB)>", "SSIM>"), rows
    )
    path = out / "demo.png"
    write_file(path, lambda file: picture(images, truth).save(file, format="PNG", optimize=True))
    return lorun, [result], path


def reference_task() -> Path:
    """The reference network's task file, in the installed package or beside it in a checkout."""
    package = Path(__file__).parent
    for folder in (package / "examples", package.parent / "examples"):
        if (folder / "compressive_sensing.py").is_file():
            return folder / "compressive_sensing.py"
    raise LoRunError(f"expected the reference network in {package / 'examples'}, found none: install lorun-adapt again")


def picture(images: dict[str, Tensor], truth: Tensor) -> Image.Image:
    """The photograph and its restorations above, their errors below; values (1, 1, H, W) in [0, 1]."""
    font = ImageFont.load_default(15)
    sheet = Image.new("L", ((PANEL + 8) * (len(images) + 1) + 8, 2 * (PANEL + CAPTION) + 8), 255)
    draw = ImageDraw.Draw(sheet)

    def put(column: int, row: int, caption: str, image: Tensor) -> None:
        left, top = 8 + column * (PANEL + 8), row * (PANEL + CAPTION)
        pixels = (image[0, 0].clamp(0, 1) * 255).round().byte().numpy()
        sheet.paste(Image.fromarray(pixels).resize((PANEL, PANEL), Image.Resampling.LANCZOS), (left, top + CAPTION))
        draw.text((left, top + 4), caption, fill=0, font=font)

    put(0, 0, "photograph", truth)
    for column, (name, image) in enumerate(images.items(), 1):
        put(column, 0, f"{name}: {psnr(image[0], truth[0]):.2f} dB", image)
        put(column, 1, f"error, {ERROR_GAIN} times brighter", (image - truth).abs() * ERROR_GAIN)
    return sheet

"""The demo: a photograph restored with the network that comes with the package, before and after conversion."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from skimage.data import camera
from torch import Tensor

from ..conversion import convert
from ..disk.folder import write_file
from ..errors import LoRunError
from ..model.lorun_model import LoRunModel
from ..model.pretrained import from_pretrained
from ..task.metrics import psnr, ssim
from ..task.task import load_task
from ..util.nested import to_device
from ..util.tables import kilobytes, table

ERROR_GAIN = 8  # brightness of the error maps, relative to the errors
PANEL = 384  # side of an image in the picture, in pixels
CAPTION = 26  # height of a caption, in pixels


def run_demo(out: Path, device: torch.device) -> tuple[LoRunModel, list[Table], Path]:
    """Restore a photograph with the original network, its conversion and the recovered one; write ``demo.png``.

    Args:
        out: the folder for ``demo.png``.

    Returns:
        The conversion; tables of sizes and quality; the path of the picture.
    """
    task = load_task(str(shipped("examples/compressive_sensing.py")))
    net = task.build()
    task.load_weights(net, None)
    net.to(device)
    recovered = from_pretrained(shipped("adapters/compressive_sensing"), net)
    rank = max(rank for ranks in recovered.stage_map.ranks.values() for rank in ranks.values())
    lorun = convert(net, rank=rank, example_inputs=to_device(task.example_inputs(), device))
    truth = torch.from_numpy(camera()).float()[None, None] / 255
    arguments = task.measure(truth)
    estimate = task.module.restore(task.module.first_estimate(*arguments), truth)
    networks = {"original": net, f"rank {rank}, as converted": lorun, f"rank {rank}, recovered": recovered}
    images = {name: task.run(network.eval(), to_device(arguments, device), truth) for name, network in networks.items()}
    report = lorun.report()
    sizes = [None, report.network_before, report.network_after, report.network_after]
    rows = []
    for (name, image), size in zip({"linear estimate": estimate, **images}.items(), sizes):
        cells = (f"{size.num_parameters:,}", kilobytes(size.num_bytes)) if size else ("-", "-")
        rows.append((name, *cells, f"{psnr(image[0], truth[0]):.2f}", f"{ssim(image[0], truth[0]):.4f}"))
    result = table(
        "compressive sensing of one photograph at 25 %", ("", "parameters>", "bytes>", "PSNR (dB)>", "SSIM>"), rows
    )
    path = out / "demo.png"
    write_file(path, lambda file: picture(images, truth).save(file, format="PNG", optimize=True))
    return lorun, [result], path


def shipped(name: str) -> Path:
    """The path of a file or folder that comes with the package: inside it if installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package, package.parent):
        if (folder / name).exists():
            return folder / name
    raise LoRunError(f"{package / name}, a part of the package, is missing: install lorun-adapt again")


def picture(images: dict[str, Tensor], truth: Tensor) -> Image.Image:
    """A sheet with the photograph and its restorations above, and the errors of these below.

    Args:
        images: the restorations by caption, each of shape (1, 1, H, W) with values in 0..1.
        truth: the photograph, likewise.
    """
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

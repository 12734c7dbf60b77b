"""The demos: images restored with the networks that come with the package, before and after conversion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import skimage.data
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from skimage.transform import resize
from torch import Tensor, nn

from ..disk.folder import write_file
from ..errors import LoRunError
from ..model.lorun_model import LoRunModel
from ..model.pretrained import from_pretrained
from ..task.cubes import read_cube
from ..task.metrics import psnr, ssim
from ..task.task import Task, load_task
from ..util.nested import to_device
from ..util.tables import kilobytes, table
from .unrecovered import unrecovered

ERROR_GAIN = 8  # brightness of the error maps, relative to the errors
PANEL = 384  # side of an image in the picture, in pixels
CAPTION = 26  # height of a caption, in pixels


@dataclass(frozen=True)
class Demo:
    """A network that comes with the package, and what it restores.

    Attributes:
        title: of the table.
        scene: returns the image (C, H, W) in [0, 1] that is measured.
        first_estimate: what the field calls the image that the network starts from.
        sigma: noise on the measurements (0..255); the set of adapters for it runs.
    """

    title: str
    scene: Callable[[], Tensor]
    first_estimate: str
    sigma: float = 0.0


def _photograph(name: str) -> Tensor:
    pixels = torch.from_numpy(getattr(skimage.data, name)()).float() / 255
    return pixels[None] if pixels.ndim == 2 else pixels.movedim(-1, 0)


def _phantom() -> Tensor:
    return torch.from_numpy(resize(skimage.data.shepp_logan_phantom(), (256, 256))).float().clamp(0, 1)[None]


DEMOS = {
    "compressive_sensing": Demo(
        "compressive sensing of one photograph at 25 %", lambda: _photograph("camera"), "linear estimate"
    ),
    "spectral_imaging": Demo(
        "28 bands of one synthetic scene from one snapshot",
        lambda: read_cube(shipped("examples/spectral_scene.npz"), 28),
        "smoothed projections",
    ),
    "super_resolution": Demo(
        "super-resolution of one photograph, blurred, half as large, noise of sigma 10",
        lambda: _photograph("astronaut")[:, :256, 96:352],
        "bicubic",
        sigma=10.0,
    ),
    "mri": Demo("MRI of the Shepp-Logan phantom, four times faster", _phantom, "zero-filled"),
}
DEFAULT = "compressive_sensing"


def run_demo(name: str, out: Path, device: torch.device) -> tuple[LoRunModel, list[Table], Path]:
    """Restore an image with the original network, its conversion and the recovered one, and write a picture of them.

    Args:
        name: one of ``DEMOS``; ``examples/`` has its task file, and ``adapters/`` its conversion.
        out: the folder for ``demo.png``, or ``demo_mri.png`` for another task than the default.

    Returns:
        The conversion; tables of sizes and quality; the path of the picture.

    Raises:
        LoRunError: a library that the task needs is not installed.
    """
    demo = DEMOS[name]
    task = load_task(str(shipped(f"examples/{name}.py")))
    net = task.build()
    task.load_weights(net, None)
    net.to(device)
    recovered = from_pretrained(shipped(f"adapters/{name}"), net)
    rank = max(rank for ranks in recovered.stage_map.ranks.values() for rank in ranks.values())
    networks: dict[str, nn.Module] = {"original": net}
    if demo.sigma:
        recovered.select_adapter(demo.sigma)
        networks[f"rank {rank}, trained for the noise"] = recovered
    else:
        inputs = to_device(task.example_inputs(), device)
        networks[f"rank {rank}, as converted"] = unrecovered(recovered, net, inputs)
        networks[f"rank {rank}, recovered"] = recovered
    truth = demo.scene()[None]
    arguments = task.measure(truth, demo.sigma)
    estimate = task.restored(task.module.first_estimate(*arguments), truth)
    images = {name: task.run(network.eval(), to_device(arguments, device), truth) for name, network in networks.items()}
    report = recovered.report()
    rows = []
    for caption, image in {demo.first_estimate: estimate, **images}.items():
        size = {"original": report.network_before, demo.first_estimate: None}.get(caption, report.network_after)
        cells = (f"{size.num_parameters:,}", kilobytes(size.num_bytes)) if size else ("-", "-")
        rows.append((caption, *cells, f"{psnr(image[0], truth[0]):.2f}", f"{ssim(image[0], truth[0]):.4f}"))
    result = table(demo.title, ("", "parameters>", "bytes>", "PSNR (dB)>", "SSIM>"), rows)
    path = out / ("demo.png" if name == DEFAULT else f"demo_{name}.png")
    sheet = picture({demo.first_estimate: estimate, **images}, truth, task)
    write_file(path, lambda file: sheet.save(file, format="PNG", optimize=True))
    return recovered, [result], path


def shipped(name: str) -> Path:
    """The path of a file or folder that comes with the package: inside it if installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package, package.parent):
        if (folder / name).exists():
            return folder / name
    raise LoRunError(f"{package / name}, a part of the package, is missing: install lorun-adapt again")


def picture(images: dict[str, Tensor], truth: Tensor, task: Task) -> Image.Image:
    """A sheet with the scene and its restorations above, and the errors of these below.

    Args:
        images: the restorations by caption, each of shape (1, C, H, W) with values in 0..1.
        truth: the scene, likewise.
        task: knows how to look at images of many channels.
    """
    font = ImageFont.load_default(15)
    width, height = (PANEL + 8) * (len(images) + 1) + 8, 2 * (PANEL + CAPTION) + 8
    mode = "L" if task.picture(truth).shape[1] == 1 else "RGB"
    sheet = Image.new(mode, (width, height), "white")
    draw = ImageDraw.Draw(sheet)

    def put(column: int, row: int, caption: str, image: Tensor) -> None:
        left, top = 8 + column * (PANEL + 8), row * (PANEL + CAPTION)
        pixels = (task.picture(image)[0] * 255).round().byte().movedim(0, -1).squeeze(-1).numpy()
        sheet.paste(Image.fromarray(pixels).resize((PANEL, PANEL), Image.Resampling.LANCZOS), (left, top + CAPTION))
        draw.text((left, top + 4), caption, fill="black", font=font)

    put(0, 0, "what is measured", truth)
    for column, (name, image) in enumerate(images.items(), 1):
        put(column, 0, f"{name}: {psnr(image[0], truth[0]):.2f} dB", image)
        put(column, 1, f"error, {ERROR_GAIN} times brighter", (image - truth).abs() * ERROR_GAIN)
    return sheet

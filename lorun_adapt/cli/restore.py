"""The subcommand restore."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import DEVICE, FILE, SEED, SIGMA, TASK, weights_options

if TYPE_CHECKING:
    import torch
    from torch import nn


@click.command()
@TASK
@click.option("--images", type=FILE, help="Folder of images to measure and restore.")
@click.option(
    "--measurements",
    type=FILE,
    help="Instead of images: a file or folder of measurements (.npy, .npz, .mat, .h5), named as in forward.",
)
@click.option("--out", type=FILE, required=True, help="Folder to write to.")
@click.option("--converted", type=FILE, help="Folder of a converted network.  [default: the original network]")
@weights_options
@click.option("--adapter-name", metavar="NAME", help="The set to restore with.  [default: the active set]")
@SIGMA
@click.option("--tile", type=click.IntRange(min=1), metavar="PIXELS", help="Restore in tiles of this side.")
@click.option("--overlap", type=click.IntRange(min=0), metavar="PIXELS", help="Of the tiles.  [default: 16]")
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
@DEVICE
@SEED
def restore(
    task: str,
    images: Path | None,
    measurements: Path | None,
    out: Path,
    converted: Path | None,
    weights: Path | None,
    weights_key: str | None,
    adapter_name: str | None,
    sigma: float,
    tile: int | None,
    overlap: int | None,
    overwrite: bool,
    device: torch.device,
    seed: int,
) -> None:
    """Restore images, from measurements of their own or simulated ones, and write them as PNG or TIFF.

    Images keep their names and their depth; images from measurements have 16 bits. Cubes are written as .npy.
    """
    from ..model.pretrained import from_pretrained
    from ..task.restore import OVERLAP, measurement_files, restore_files, restore_measurements
    from ..task.task import load_task
    from ..util.modules import positional_arguments
    from ..util.seeds import set_seed

    if (images is None) == (measurements is None):
        raise click.UsageError("give either --images or --measurements")
    if measurements is not None and (tile or (sigma and converted is None)):
        raise click.UsageError(
            "--tile, and --sigma without --converted, are for images that are measured: give --images"
        )
    if converted is None and adapter_name:
        raise click.UsageError("--adapter-name needs a conversion: give --converted")
    if converted is not None and (weights or weights_key):
        raise click.UsageError("--weights are those of the original: leave out either them or --converted")
    if tile is None and overlap is not None:
        raise click.UsageError("--overlap is that of tiles: give --tile")
    set_seed(seed)
    spec = load_task(task)
    net = spec.build().to(device)
    names = positional_arguments(net)
    noise: contextlib.AbstractContextManager = contextlib.nullcontext()
    if converted is None:
        spec.load_weights(net, weights, weights_key)
        network: nn.Module = net
    else:
        network = lorun = from_pretrained(converted, net).eval()
        lorun.task = spec
        if adapter_name is not None:
            lorun.set_adapter(adapter_name)
        noise = lorun.assume_noise(sigma) if sigma else noise
    with noise:
        if measurements is not None:
            files = measurement_files(measurements)
            written = restore_measurements(spec, network, names, files, out, overwrite=overwrite)
        elif images is not None:
            files = spec.images(images)
            overlap = OVERLAP if overlap is None else overlap
            written = restore_files(
                spec, network, files, out, sigma=sigma, tile=tile, overlap=overlap, overwrite=overwrite
            )
    click.echo(f"wrote {len(written)} {'image' if len(written) == 1 else 'images'} to {out}")

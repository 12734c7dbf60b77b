"""The command ``lorun-adapt``, and its subcommands inspect, eval, report and demo."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .._version import __version__
from ..errors import LoRunError
from .bench import bench
from .export import export
from .hub import list_, pull, push
from .memory import keep_freed_memory
from .options import (
    DEVICE,
    FILE,
    SEED,
    SIGMA,
    STAGES,
    TASK,
    Command,
    example_inputs,
    show,
    trained_network,
    weights_options,
    working,
)
from .restore import restore
from .training import convert_, finetune, recover

if TYPE_CHECKING:
    import torch

DEMOS = ("compressive_sensing", "spectral_imaging", "super_resolution", "mri")

# torch and PEFT take seconds to import, so each command imports them only when it runs; --help stays fast.


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lorun-adapt")
def cli() -> None:
    """Collapse a trained deep unfolding network into one shared denoiser and a small adapter per stage.

    TASK is a Python file (or package.module) with three functions: build() returns the network,
    measure() makes its inputs from an image, and restore() gets the image from its output.
    """


@cli.command(cls=Command)
@TASK
@weights_options
@STAGES
@DEVICE
@SEED
def inspect(
    task: str, weights: Path | None, weights_key: str | None, stages: tuple[str, ...], device: torch.device, seed: int
) -> None:
    """Show the stages found in the network and the tensors they would share."""

    from ..stages.find import find_stages
    from ..task.task import load_task
    from ..util.seeds import set_seed

    set_seed(seed)
    spec = load_task(task)
    net = spec.build()
    if weights is not None or weights_key is not None:
        spec.load_weights(net, weights, weights_key)
    with working("looking for stages"):
        found = find_stages(net.to(device), stages=stages or None, example_inputs=example_inputs(spec, device))
    show(found.tables())


@cli.command("eval")
@TASK
@click.option("--images", type=FILE, required=True, help="Folder of images.")
@weights_options
@click.option("--converted", type=FILE, help="Folder of a conversion to compare with the original.")
@click.option("--adapter-name", metavar="NAME", help="The set to evaluate.  [default: the active set]")
@SIGMA
@click.option(
    "--metric",
    "metrics",
    multiple=True,
    metavar="NAME",
    help="A further metric; may be repeated: psnr_y (PSNR of luma), sam (spectral angle, in radians), lpips.",
)
@click.option("--record", is_flag=True, help="Save the result in the conversion and its model cards.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@DEVICE
@SEED
def eval_(
    task: str,
    images: Path,
    weights: Path | None,
    weights_key: str | None,
    converted: Path | None,
    adapter_name: str | None,
    sigma: float,
    metrics: tuple[str, ...],
    record: bool,
    as_json: bool,
    device: torch.device,
    seed: int,
) -> None:
    """Measure PSNR, SSIM and other metrics on a folder of images."""

    from ..files.save import update_cards
    from ..model.pretrained import from_pretrained
    from ..task.evaluate import evaluate
    from ..task.metrics import check_metrics
    from ..task.task import load_task
    from ..util.seeds import set_seed

    printed = sys.stdout
    if as_json:  # alone on standard output, whatever the task prints
        click.get_current_context().with_resource(contextlib.redirect_stdout(sys.stderr))
    if converted is None and (adapter_name or record):
        raise click.UsageError("--adapter-name and --record need a conversion: give --converted")
    check_metrics(metrics)
    set_seed(seed)
    spec = load_task(task)
    files = spec.images(images)
    net = spec.build().to(device)
    original = net if weights or weights_key or spec.weights or converted is None else None
    if original is not None:
        spec.load_weights(original, weights, weights_key)
    lorun = from_pretrained(converted, net).eval() if converted is not None else None
    before: list[str] | dict[int, str] = []
    if lorun is not None:
        lorun.task, before = spec, lorun.active_adapters
        if adapter_name is not None:
            lorun.set_adapter(adapter_name)
        known = all(lorun.adapter_info[name].noise is not None for name in lorun.converted().active.values())
        if original is not None and (sigma or known) and spec.schedule is not None:
            spec.schedule(original, [sigma] * len(lorun.stage_map))
    with lorun.assume_noise(sigma) if lorun is not None and sigma else contextlib.nullcontext():
        result = evaluate(
            spec,
            files,
            original,
            lorun,
            sigma=sigma,
            metrics=metrics,
            num_parameters=sum(p.numel() for p in net.parameters()),
            num_parameters_converted=lorun.report().network_after.num_parameters if lorun is not None else None,
        )
    if as_json:
        from ..util.numbers import without_nan

        click.echo(json.dumps(without_nan(result.as_dict()), indent=2, allow_nan=False), file=printed)
    else:
        show(result.tables())
    if record and converted is not None and lorun is not None:
        lorun.note_quality(result.quality(images.resolve().name, sigma))
        lorun.set_adapter(before)
        update_cards(lorun.converted(), converted)


@cli.command()
@click.argument("converted", metavar="DIR", type=FILE)
@click.option("--task", required=True, help="Task file, or package.module.")
@weights_options
@click.option("--images", type=FILE, required=True, help="Folder of images to measure on.")
@click.option("--out", type=FILE, default="report.html", show_default=True, help="The HTML file to write.")
@DEVICE
@SEED
def report(
    converted: Path,
    task: str,
    weights: Path | None,
    weights_key: str | None,
    images: Path,
    out: Path,
    device: torch.device,
    seed: int,
) -> None:
    """Write an HTML report with images on the conversion in DIR: its size, and its quality by stage."""
    from ..model.pretrained import from_pretrained
    from ..util.threads import helpful_threads
    from .page import write_page

    spec, net = trained_network(task, weights, weights_key, seed)
    lorun = from_pretrained(converted, net.to(device)).eval()
    lorun.task = spec
    with helpful_threads():
        write_page(out, spec, net, lorun, spec.images(images))
    click.echo(f"page: {out}")


@cli.command()
@click.option("--task", type=click.Choice(DEMOS), default=DEMOS[0], show_default=True, help="Which network.")
@click.option("--out", type=FILE, default=".", show_default=True, help="Folder for the picture, demo.png.")
@DEVICE
@SEED
def demo(task: str, out: Path, device: torch.device, seed: int) -> None:
    """Restore an image with an included network: original, converted, and recovered."""

    from ..util.seeds import set_seed
    from ..util.threads import helpful_threads
    from .demo import run_demo

    set_seed(seed)
    with helpful_threads(), working("converting the reference network and restoring an image"):
        lorun, tables, path = run_demo(task, out, device)
    show([*lorun.stage_map.tables(), *lorun.report().tables(), *tables])
    click.echo(f"picture: {path}")


for command in (convert_, recover, finetune, restore, bench, export, push, pull, list_):
    cli.add_command(command)


def main() -> None:
    """Run the command; a user's mistake prints one sentence and exits with code 2."""
    keep_freed_memory()
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files need not be in the terminal's character set
        sys.stdout.reconfigure(errors="backslashreplace")
    warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
    try:
        cli(prog_name="lorun-adapt")
    except LoRunError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)

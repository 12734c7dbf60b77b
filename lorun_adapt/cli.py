"""The command ``lorun-adapt``."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ._version import __version__
from .errors import LoRunError
from .hub_commands import list_, pull, push
from .options import (
    BUDGET,
    CONVERTED,
    DEVICE,
    DTYPE,
    FILE,
    OUT,
    RANK,
    SEED,
    SIGMA,
    STAGES,
    TASK,
    WEIGHTS,
    Command,
    show,
    training_options,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

    from .calibration import Crops
    from .model import LoRunModel
    from .task import Task

# torch and PEFT take seconds to import: each command imports what it runs, so that --help is quick.


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lorun-adapt")
def cli() -> None:
    """Collapse a trained deep unfolding network into one shared denoiser and a small adapter per stage.

    TASK is a Python file (or package.module) that says how to build the network, how to make its
    inputs from images, and which images its output holds: build(), measure() and restore().
    """


@cli.command(cls=Command)
@TASK
@WEIGHTS
@STAGES
@DEVICE
@SEED
def inspect(task: str, weights: Path | None, stages: tuple[str, ...], device: torch.device, seed: int) -> None:
    """Show which stages are found, and what would be shared."""

    from .find import find_stages
    from .task import load_task

    _seed(seed)
    spec = load_task(task)
    net = spec.build()
    if weights is not None:
        spec.load_weights(net, weights)
    with _working("looking for stages"):
        found = find_stages(net.to(device), stages=stages or None, example_inputs=_example(spec, device))
    show(found.tables())


@cli.command("convert", cls=Command)
@TASK
@WEIGHTS
@RANK
@BUDGET
@STAGES
@OUT
@DTYPE
@training_options(required=False)
@DEVICE
@SEED
def convert_(
    task: str,
    weights: Path | None,
    rank: int | float | None,
    budget: int | float | None,
    stages: tuple[str, ...],
    out: Path,
    dtype: str | None,
    device: torch.device,
    seed: int,
    calibration: Path | None,
    **training: Any,
) -> None:
    """Collapse the stages and save base and adapters; with --calibration, recover the quality.

    Recovery distils the original network into the conversion on crops of the images, until --minutes
    are over. Ctrl-C saves the best so far. `accelerate launch -m lorun_adapt convert …` spreads it
    over processes and GPUs.
    """
    from .calibration import Batches
    from .conversion import collapse

    if calibration is None and (given := [f"--{name}" for name, value in training.items() if value]):
        raise click.UsageError(f"{' and '.join(given)} without --calibration: give the folder of images")
    spec, net = _trained(task, weights, seed)
    crops = None if calibration is None else _crops(spec, calibration, seed, training)
    weighed = None if crops is None or budget is None else Batches(crops)
    with _working("converting") if weighed is None else contextlib.nullcontext():  # that has a bar of its own
        lorun = collapse(
            net.to(device),
            rank=rank,
            budget=budget,
            stages=stages or None,
            example_inputs=_example(spec, device),
            calibration=weighed,
            seed=seed,
        )
    finished = crops is None or _recover(lorun, net, crops, seed, training)
    _save(lorun, out, dtype, finished)


@cli.command()
@TASK
@WEIGHTS
@CONVERTED
@OUT
@DTYPE
@training_options(required=True)
@DEVICE
@SEED
def recover(
    task: str,
    weights: Path | None,
    converted: Path,
    out: Path,
    dtype: str | None,
    device: torch.device,
    seed: int,
    calibration: Path,
    **training: Any,
) -> None:
    """Recover the quality of a conversion, or what is still missing of it.

    The original network is distilled into it on crops of the images, until --minutes are over. Ctrl-C
    saves the best so far.
    """
    from .checkpoint import from_pretrained

    spec, net = _trained(task, weights, seed)
    crops = _crops(spec, calibration, seed, training)
    lorun = from_pretrained(converted, net.to(device))
    finished = _recover(lorun, net, crops, seed, training)
    _save(lorun, out, dtype, finished)


@cli.command("eval")
@TASK
@click.option("--images", type=FILE, required=True, help="Folder of images.")
@WEIGHTS
@click.option("--converted", type=FILE, help="Folder of a conversion, shown beside the original.")
@SIGMA
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@DEVICE
@SEED
def eval_(
    task: str,
    images: Path,
    weights: Path | None,
    converted: Path | None,
    sigma: float,
    as_json: bool,
    device: torch.device,
    seed: int,
) -> None:
    """PSNR and SSIM over a folder of images."""

    from .checkpoint import from_pretrained
    from .evaluate import evaluate
    from .task import load_task

    _seed(seed)
    spec = load_task(task)
    files = spec.images(images)
    net = spec.build().to(device)
    original = net if weights or spec.weights or converted is None else None
    if original is not None:
        spec.load_weights(original, weights)
    lorun = from_pretrained(converted, net).eval() if converted is not None else None
    result = evaluate(
        spec,
        files,
        original,
        lorun,
        sigma=sigma,
        parameters=sum(p.numel() for p in net.parameters()),
        parameters_converted=lorun.num_parameters() if lorun is not None else None,
    )
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=2))
    else:
        show(result.tables())


@cli.command()
@click.argument("converted", metavar="DIR", type=FILE)
@click.option("--task", required=True, help="Task file, or package.module.")
@WEIGHTS
@click.option("--images", type=FILE, required=True, help="Folder of images to judge on.")
@click.option("--out", type=FILE, default="report.html", show_default=True, help="The page to write.")
@DEVICE
@SEED
def report(
    converted: Path, task: str, weights: Path | None, images: Path, out: Path, device: torch.device, seed: int
) -> None:
    """Write a page with pictures about the conversion in DIR: what it saves, and what it costs where."""
    from .checkpoint import from_pretrained
    from .page import write_page

    spec, net = _trained(task, weights, seed)
    lorun = from_pretrained(converted, net.to(device)).eval()
    write_page(out, spec, net, lorun, spec.images(images))
    click.echo(f"page: {out}")


@cli.command()
@click.option("--out", type=FILE, default=".", show_default=True, help="Folder for demo.png.")
@DEVICE
@SEED
def demo(out: Path, device: torch.device, seed: int) -> None:
    """Restore a photograph with the network that comes with the package, as converted and as recovered."""

    from .demo import run_demo

    _seed(seed)
    with _working("converting the reference network and restoring a photograph"):
        lorun, tables, path = run_demo(out, device)
    show([*lorun.stage_map.tables(), *lorun.report().tables(), *tables])
    click.echo(f"picture: {path}")


def _seed(seed: int) -> None:
    from .seeds import set_seed

    set_seed(seed)


def _trained(task: str, weights: Path | None, seed: int) -> tuple[Task, nn.Module]:
    """The task and its network, with its weights."""
    from .task import load_task

    _seed(seed)
    spec = load_task(task)
    net = spec.build()
    spec.load_weights(net, weights)
    return spec, net


def _crops(spec: Task, folder: Path, seed: int, training: dict[str, Any]) -> Crops:
    from .budget import Budget
    from .calibration import Crops

    Budget(training["minutes"], training["steps"])
    return Crops(spec, spec.images(folder), sigma=training["sigma"], seed=seed, size=training["batch"])


def _recover(lorun: LoRunModel, net: nn.Module, crops: Crops, seed: int, training: dict[str, Any]) -> bool:
    return lorun.recover(
        net,
        crops,
        minutes=training["minutes"],
        steps=training["steps"],
        loss=crops.loss if training["truth"] else None,
        checkpoint=training["checkpoint"],
        seed=seed,
    )


def _save(lorun: LoRunModel, out: Path, dtype: str | None, finished: bool) -> None:
    """Save, and say what was; exit as shells expect it of what Ctrl-C has stopped."""
    import torch

    from .folder import tensor_bytes

    if _is_main_process():
        lorun.save_pretrained(out, dtype=getattr(torch, dtype) if dtype else None)
        show(lorun.report().tables())
        click.echo(f"saved to {out}: {tensor_bytes(out):,} bytes of safetensors")
    if not finished:
        sys.exit(130)


def _is_main_process() -> bool:
    from .processes import launched, process_state

    return not launched() or process_state().is_main_process


def _example(task: Task, device: torch.device) -> tuple[Any, ...]:
    from .nested import to_device

    return to_device(task.example_inputs(), device)


@contextlib.contextmanager
def _working(what: str) -> Iterator[None]:
    """A spinner on a terminal, one line elsewhere; on standard error."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(f"{what} …"):
            yield
    else:
        click.echo(f"{what} …", err=True)
        yield


for command in (push, pull, list_):
    cli.add_command(command)


def main() -> None:
    """Run the command; a user's mistake ends with exit code 2 and one sentence."""
    warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
    try:
        cli(prog_name="lorun-adapt")
    except LoRunError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)

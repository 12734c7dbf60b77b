"""The command ``lorun-adapt``."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ._version import __version__
from .errors import LoRunError

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from torch import nn

    from .calibration import Crops
    from .model import LoRunModel
    from .task import Task

# torch and PEFT take seconds to import: each command imports what it runs, so that --help is quick.

DTYPES = ("float32", "float16", "bfloat16")
Function = TypeVar("Function", bound=Callable[..., Any])


class _Number(click.ParamType):
    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | float:
        try:
            return int(value)
        except ValueError:
            with contextlib.suppress(ValueError):
                if 0 < float(value) < 1:
                    return float(value)
        self.fail(f"{value!r} is neither a whole number nor a share between 0 and 1", param, ctx)


def _device(ctx: click.Context, param: click.Parameter, value: str | None) -> torch.device:
    import torch

    if value is None:
        from .processes import launched, process_state

        return process_state().device if launched() else torch.device("cpu")
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(str(error).splitlines()[0]) from None
    return device


class _Command(click.Command):
    """A command that takes ``--stages A B`` for ``--stages A --stages B`` once its TASK is given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--stages" in args and not args[0].startswith("-"):
            place = args.index("--stages") + 2
            while place < len(args) and not args[place].startswith("-"):
                args = [*args[:place], "--stages", *args[place:]]
                place += 2
        return super().parse_args(ctx, args)


FILE = click.Path(path_type=Path)
TASK = click.argument("task", metavar="TASK")
WEIGHTS = click.option("--weights", type=FILE, help="Checkpoint of the original network.  [default: the task's]")
STAGES = click.option("--stages", multiple=True, metavar="PATTERN ...", help="Name the stages, as 'fcs.*'.")
RANK = click.option(
    "--rank",
    type=_Number(),
    help="Rank of the adapters, or the share (0 to 1) of the residuals' energy to keep.  [default: 8]",
)
BUDGET = click.option(
    "--budget",
    type=_Number(),
    help="Instead of a rank: parameters of the whole network, or the share (0 to 1) of those it has.",
)
CONVERTED = click.option("--converted", type=FILE, required=True, help="Folder of a conversion.")
OUT = click.option("--out", type=FILE, required=True, help="Folder to save to.")
SIGMA = click.option(
    "--sigma",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Noise on the measurements, on a scale of 0 to 255.",
)


def _training(required: bool) -> Callable[[Function], Function]:
    """The options of what trains."""

    def decorate(command: Function) -> Function:
        for option in reversed(
            (
                click.option(
                    "--calibration", type=FILE, required=required, help="Folder of images to recover the quality on."
                ),
                click.option("--minutes", type=float, help="How long to train."),
                click.option("--steps", type=int, help="Instead of minutes: how many steps, for runs that repeat."),
                click.option("--truth", is_flag=True, help="Use the calibration images as ground truth as well."),
                click.option("--batch", type=click.IntRange(min=1), help="Crops in a batch.  [default: 17,000 pixels]"),
                click.option("--checkpoint", type=FILE, help="File to keep the state in, and to go on from."),
                SIGMA,
            )
        ):
            command = option(command)
        return command

    return decorate


DEVICE = click.option(
    "--device",
    callback=_device,
    help="Where to run: cpu, cuda, …  [default: cpu, or what `accelerate launch` gives the process]",
)
SEED = click.option("--seed", default=0, show_default=True, help="Seed of the random numbers.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lorun-adapt")
def cli() -> None:
    """Collapse a trained deep unfolding network into one shared denoiser and a small adapter per stage.

    TASK is a Python file (or package.module) that says how to build the network, how to make its
    inputs from images, and which images its output holds: build(), measure() and restore().
    """


@cli.command(cls=_Command)
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
    _show(found.tables())


@cli.command("convert", cls=_Command)
@TASK
@WEIGHTS
@RANK
@BUDGET
@STAGES
@OUT
@click.option("--dtype", type=click.Choice(DTYPES), help="Store numbers as this.  [default: as they are]")
@_training(required=False)
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
    from .conversion import convert

    if calibration is None and (given := [f"--{name}" for name, value in training.items() if value]):
        raise click.UsageError(f"{' and '.join(given)} without --calibration: give the folder of images")
    spec, net = _trained(task, weights, seed)
    crops = None if calibration is None else _crops(spec, calibration, seed, training)
    with _working("converting"):
        lorun = convert(
            net.to(device), rank=rank, budget=budget, stages=stages or None, example_inputs=_example(spec, device)
        )
    finished = crops is None or _recover(lorun, net, crops, seed, training)
    _save(lorun, out, dtype, finished)


@cli.command()
@TASK
@WEIGHTS
@CONVERTED
@OUT
@click.option("--dtype", type=click.Choice(DTYPES), help="Store numbers as this.  [default: as they are]")
@_training(required=True)
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
        _show(result.tables())


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
@RANK
@DEVICE
@SEED
def demo(out: Path, rank: int | float | None, device: torch.device, seed: int) -> None:
    """Convert the network that comes with the package and restore a photograph with it."""

    from .demo import run_demo

    _seed(seed)
    with _working("converting the reference network and restoring a photograph"):
        lorun, tables, path = run_demo(out, rank or 8, device)
    _show([*lorun.stage_map.tables(), *lorun.report().tables(), *tables])
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

    if _is_main_process():
        lorun.save_pretrained(out, dtype=getattr(torch, dtype) if dtype else None)
        _show(lorun.report().tables())
        size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
        click.echo(f"saved to {out}: {size:,} bytes of safetensors")
    if not finished:
        sys.exit(130)


def _is_main_process() -> bool:
    from .processes import launched, process_state

    return not launched() or process_state().is_main_process


def _example(task: Task, device: torch.device) -> tuple[Any, ...]:
    from .nested import to_device

    return to_device(task.example_inputs(), device)


def _show(tables: list[Table]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for item in tables:
        console.print(item)


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


def main() -> None:
    """Run the command; a user's mistake ends with exit code 2 and one sentence."""
    warnings.showwarning = lambda message, *_, **__: click.echo(f"warning: {message}", err=True)
    try:
        cli(prog_name="lorun-adapt")
    except LoRunError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)

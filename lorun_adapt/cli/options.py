"""What the commands share: options, loading of the task and its network, and output to the terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from torch import nn

    from ..task.task import Task

Function = TypeVar("Function", bound=Callable[..., Any])


class Number(click.ParamType):
    """A type of option: a whole number, or a share between 0 and 1."""

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
        from ..training.processes import launched, process_state

        return process_state().device if launched() else torch.device("cpu")
    try:
        device = torch.device(value)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise click.BadParameter(str(error).splitlines()[0]) from None
    return device


def _dtype(ctx: click.Context, param: click.Parameter, value: str | None) -> torch.dtype | None:
    import torch

    return None if value is None else getattr(torch, value)


class Command(click.Command):
    """A command that accepts ``--stages A B`` for ``--stages A --stages B`` after its TASK."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--stages" in args and not args[0].startswith("-"):
            place = args.index("--stages") + 2
            while place < len(args) and not args[place].startswith("-"):
                args = [*args[:place], "--stages", *args[place:]]
                place += 2
        return super().parse_args(ctx, args)


FILE = click.Path(path_type=Path)
TASK = click.argument("task", metavar="TASK")


def weights_options(command: Function) -> Function:
    """The options ``--weights`` and ``--weights-key``."""
    key = click.option(
        "--weights-key",
        metavar="KEY",
        help="Key of the weights in their file, such as 'model.ema'.  [default: the one that fits, averages first]",
    )
    file = click.option("--weights", type=FILE, help="Weights of the original network.  [default: the task's]")
    return file(key(command))


STAGES = click.option("--stages", multiple=True, metavar="PATTERN ...", help="Names of the stages, such as 'fcs.*'.")
RANK = click.option("--rank", type=int, help="Rank of every adapter.  [default: 8]")
ENERGY = click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="SHARE",
    help="Instead of a rank: the share (0 to 1) of the residuals' energy that the rank of each tensor keeps.",
)
BUDGET = click.option(
    "--budget",
    type=Number(),
    metavar="N|SHARE",
    help="Instead of a rank: parameters of the converted network, or a share (0 to 1) of the original's.",
)
FASTER = click.option(
    "--faster",
    type=click.FloatRange(1, min_open=True),
    metavar="TIMES",
    help="Instead of a rank: the factor by which to reduce the number of operations, such as 2.",
)
NO_SHARE = click.option(
    "--no-share",
    is_flag=True,
    help="Keep every stage's own weights and add untrained adapters; the network does not become smaller.",
)
CONVERTED = click.option("--converted", type=FILE, required=True, help="Folder of a converted network.")


def _out(ctx: click.Context, param: click.Parameter, value: Path) -> Path:
    from ..disk.folder import as_path, check_place
    from ..files.layout import CONFIG_FILE

    check_place(as_path(value), CONFIG_FILE)
    return value


OUT = click.option("--out", type=FILE, required=True, callback=_out, help="Folder to save to.")
DTYPE = click.option(
    "--dtype",
    type=click.Choice(("float32", "float16", "bfloat16", "int8")),
    callback=_dtype,
    help="Type of the numbers in the files; int8 has a scale for each channel.  [default: unchanged]",
)


def sigma_option(note: str = "", **settings: Any) -> Callable[[Function], Function]:
    """The option ``--sigma``; ``note`` ends its help text, ``settings`` are those of ``click.option``."""
    help_text = "Standard deviation of the noise on the measurements, on a scale of 0 to 255." + note
    return click.option("--sigma", type=click.FloatRange(min=0), help=help_text, **settings)


SIGMA = sigma_option(default=0.0, show_default=True)
MINUTES = click.option("--minutes", type=float, help="How long to train.")
STEPS = click.option("--steps", type=int, help="Instead of minutes: how many steps to train, for reproducible runs.")
BATCH = click.option("--batch", type=click.IntRange(min=1), help="Crops in a batch.  [default: 17,000 pixels]")
RESUME_FROM = click.option(
    "--resume-from",
    type=FILE,
    metavar="FILE",
    help="State file: keeps the state of the run, and resumes from it if it exists.",
)
ALSO = click.option(
    "--also",
    multiple=True,
    metavar="PATTERN",
    help="Parameters outside the stages to train as well, such as 'steps.*'.",
)
RECOMPUTE = click.option(
    "--recompute", is_flag=True, help="Save memory: run the stages again in the backward pass.  [a third slower]"
)
TRUTH = click.option("--truth", is_flag=True, help="Use the calibration images as ground truth as well.")


def calibration_options(required: bool) -> Callable[[Function], Function]:
    """The options of recovery; ``required``: whether ``--calibration`` must be given."""

    def decorate(command: Function) -> Function:
        folder = click.option(
            "--calibration", type=FILE, required=required, help="Folder of images on which to recover the quality."
        )
        noise = sigma_option(note="  [default: that of the adapter set, or 0]")
        for option in reversed((folder, MINUTES, STEPS, TRUTH, BATCH, ALSO, RECOMPUTE, RESUME_FROM, noise)):
            command = option(command)
        return command

    return decorate


DEVICE = click.option(
    "--device",
    callback=_device,
    help="Where to run: cpu, cuda, …  [default: cpu, or what `accelerate launch` gives the process]",
)
SEED = click.option("--seed", default=0, show_default=True, help="Seed of the random numbers.")


def show(tables: list[Table]) -> None:
    """Print tables as wide as the terminal, or 160 characters wide in a file or pipe."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    for item in tables:
        console.print(item)


def trained_network(task: str, weights: Path | None, weights_key: str | None, seed: int) -> tuple[Task, nn.Module]:
    """The task and its network with trained weights, built after seeding all random numbers."""
    from ..task.task import load_task
    from ..util.seeds import set_seed

    set_seed(seed)
    spec = load_task(task)
    net = spec.build()
    spec.load_weights(net, weights, weights_key)
    return spec, net


def example_inputs(task: Task, device: torch.device) -> tuple[Any, ...]:
    """Arguments of a forward of the task's network, on ``device``."""
    from ..util.nested import to_device

    return to_device(task.example_inputs(), device)


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """Show ``what`` is being done in the block, on standard error: a spinner on a terminal, one line elsewhere."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(f"{what} …"):
            yield
    else:
        click.echo(f"{what} …", err=True)
        yield

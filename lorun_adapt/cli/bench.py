"""The command bench."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import LoRunError
from .options import DEVICE, FILE, RANK, SEED, TASK, show, weights_options, working

if TYPE_CHECKING:
    import torch

DEFAULT_SIZE = 128  # pixels a side


@click.command()
@TASK
@weights_options
@click.option("--converted", type=FILE, help="Folder of a conversion.  [default: converted without data]")
@RANK
@click.option(
    "--size", type=click.IntRange(min=1), help="Pixels a side.  [default: 128, or the task's patch if 128 does not fit]"
)
@click.option("--threads", type=click.IntRange(min=1), help="Threads on a CPU.  [default: as many as it has cores]")
@click.option(
    "--seconds", type=click.FloatRange(min=0), default=10.0, show_default=True, help="How long to measure each row."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@DEVICE
@SEED
def bench(
    task: str,
    weights: Path | None,
    weights_key: str | None,
    converted: Path | None,
    rank: int | None,
    size: int | None,
    threads: int | None,
    seconds: float,
    as_json: bool,
    device: torch.device,
    seed: int,
) -> None:
    """Time the network, its conversion and the alternatives, and measure their bytes.

    They take turns in this process. The first column shows the plain network's medians; the others show ratios to
    them, so below 1 is better. ± is half the interquartile range of the rounds, in percent of the median.
    """
    import torch

    from ..bench.bench import bench as measure_all
    from ..conversion import convert
    from ..model.pretrained import from_pretrained
    from ..task.task import load_task
    from ..util.nested import to_device
    from ..util.seeds import set_seed

    printed = sys.stdout
    if as_json:  # alone on standard output, whatever the task prints
        click.get_current_context().with_resource(contextlib.redirect_stdout(sys.stderr))
    if converted is not None and rank is not None:
        raise click.UsageError("--rank is for a conversion made here, and --converted has one: give one of them")
    if threads is not None:
        torch.set_num_threads(threads)
    set_seed(seed)
    spec = load_task(task)
    net = spec.build()
    if weights or weights_key or spec.weights:  # times do not depend on them
        spec.load_weights(net, weights, weights_key)
    net = net.to(device)

    def inputs(side: int, batch: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(batch, spec.channels, side, side, generator=generator)
        return to_device(spec.measure(images), device)

    if converted is not None:
        lorun = from_pretrained(converted, net)
    else:
        with working("converting"):
            lorun = convert(net, rank=rank, example_inputs=inputs(spec.patch, 1))
    if size is None:
        size = DEFAULT_SIZE
        try:
            inputs(size, 1)
        except LoRunError:  # some networks take images of one size only
            size = spec.patch
    with working("measuring"):
        result = measure_all(net, lorun, inputs, size=size, device=device, seconds=seconds)
    if as_json:
        click.echo(json.dumps(result.as_dict(), indent=2), file=printed)
        return
    show(result.tables())
    for name, why in result.missing.items():
        click.echo(f"no column {name!r}: {why}")

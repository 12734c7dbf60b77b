"""The command export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import FILE, working

SUFFIXES = (".onnx", ".pt2")


def _out(ctx: click.Context, param: click.Parameter, value: Path) -> Path:
    if value.suffix not in SUFFIXES:
        raise click.BadParameter(f"expected a file that ends in {' or '.join(SUFFIXES)}, found {str(value)!r}")
    return value


@click.command()
@click.argument("converted", metavar="DIR", type=FILE)
@click.option("--task", required=True, help="Task file, or package.module.")
@click.option(
    "--out", type=FILE, required=True, callback=_out, help="The file to write: .onnx, or .pt2 of torch.export."
)
@click.option("--adapter-name", metavar="NAME", help="The set to export.  [default: the active set]")
@click.option("--size", type=click.IntRange(min=1), help="Pixels a side.  [default: the task's patch]")
@click.option("--dynamic", is_flag=True, help="Let the file take any number of images, of any size.")
@click.option(
    "--adapters-as-inputs",
    is_flag=True,
    help="Let the .onnx file take the tensors of a set as inputs, and write each set to a file beside it.",
)
def export(
    converted: Path,
    task: str,
    out: Path,
    adapter_name: str | None,
    size: int | None,
    dynamic: bool,
    adapters_as_inputs: bool,
) -> None:
    """Write the conversion in DIR to a file that runs without lorun-adapt.

    The file holds the base once; the weights of the stages are computed as it runs. An ONNX file is run in
    onnxruntime before it is written, and compared.
    """
    import torch

    from ..export.onnx import save_onnx
    from ..export.program import export_program, save_program
    from ..export.sets import inputs_of_sets, save_sets
    from ..model.pretrained import from_pretrained
    from ..task.task import load_task

    if adapters_as_inputs and out.suffix != ".onnx":
        raise click.UsageError("--adapters-as-inputs is for .onnx files: choose such a file, or leave it out")
    spec = load_task(task)
    lorun = from_pretrained(converted, spec.build()).eval()
    lorun.task = spec
    if adapter_name is not None:
        lorun.set_adapter(adapter_name)
    side = spec.patch if size is None else size

    def measure(pixels: int, images: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        return spec.measure(torch.rand(images, spec.channels, pixels, pixels, generator=generator))

    files = [out]
    with working("exporting"):
        exported = export_program(lorun.network, measure, side, dynamic)
        if out.suffix == ".onnx":
            sets = inputs_of_sets(lorun, exported.run) if adapters_as_inputs else {}
            difference, inputs = save_onnx(exported, out, sets)
            files += save_sets(sets, inputs, out)
            click.echo(f"onnxruntime's output differs by {difference:.1e} of PyTorch's")
        else:
            save_program(exported, out)
    for file in files:
        click.echo(f"file: {file} ({file.stat().st_size / 1000:,.1f} kB)")

"""A network as a program of ``torch.export``, in which the base is stored once."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..disk.folder import write_file
from ..errors import LoRunError
from ..util.modules import evaluating
from ..util.text import shortened

Measure = Callable[[int, int], tuple[Any, ...]]  # pixels a side and images -> arguments of a forward


def export_program(network: nn.Module, measure: Measure, size: int, dynamic: bool = False) -> ExportedProgram:
    """Return a network in evaluation mode as a program of ``torch.export``.

    Args:
        network: the network; of a :class:`LoRunModel`, its ``network``.
        measure: makes the arguments of a forward.
        size: pixels a side.
        dynamic: let the program take any number of images, of any size that the network takes.

    Raises:
        LoRunError: ``torch.export`` cannot trace the network, or not for other sizes.
    """
    arguments = measure(size, 2 if dynamic else 1)  # torch.export makes a program for one image if it sees one
    shapes = _varying(arguments, measure(2 * size, 3)) if dynamic else None
    try:
        with torch.no_grad(), evaluating(network):
            return torch.export.export(network, arguments, dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises many types
        hint = ": leave out dynamic sizes" if dynamic else ": have its forward use nothing but tensors"
        raise LoRunError(
            f"torch.export cannot trace {type(network).__name__} "
            f"({type(error).__name__}: {shortened(str(error))}){hint}"
        ) from error


def _varying(arguments: Sequence[Any], others: Sequence[Any]) -> tuple[Any, ...]:
    """For each argument, which of its dimensions depend on the number and size of the images."""
    found: list[Any] = []
    for one, other in zip(arguments, others, strict=True):
        if isinstance(one, Tensor):
            found.append({dim: Dim.AUTO for dim in range(one.dim()) if one.shape[dim] != other.shape[dim]} or None)
        else:
            found.append(None)
    return tuple(found)


def save_program(program: ExportedProgram, path: Path) -> None:
    """Write a program to a file that ``torch.export.load`` reads; it appears whole or not at all."""
    program = copy.copy(program)
    program.example_inputs = None  # they would be pickled
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are views of others, which only matters on a GPU
        torch.export.save(program, content)
    write_file(path, lambda file: file.write(content.getbuffer()))

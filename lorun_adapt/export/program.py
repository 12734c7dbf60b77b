"""A network as a program of ``torch.export``, in which the base is stored once."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..disk.folder import write_file
from ..errors import LoRunError
from ..network.eight_bits import check_floats
from ..util.modules import evaluating
from ..util.text import shortened

PLAIN = (Tensor, list, tuple, dict, int, float, bool, str, type(None))  # what a program takes
Measure = Callable[[int, int], tuple[Any, ...]]  # pixels a side and images -> arguments of a forward


class Exported(NamedTuple):
    """A program of ``torch.export``.

    Attributes:
        program: the program.
        arguments: arguments that it takes.
        run: runs a network of the same structure on the arguments, and on those that are part of the program.
        prefix: what stands before the names of the network's tensors in it.
    """

    program: ExportedProgram
    arguments: tuple[Any, ...]
    run: Callable[[nn.Module], Any]
    prefix: str


def export_program(network: nn.Module, measure: Measure, size: int, dynamic: bool = False) -> Exported:
    """Return a network in evaluation mode as a program of ``torch.export``.

    Arguments that are objects of other libraries, such as the physics of deepinv, become part of the program.

    Args:
        network: the network; of a :class:`LoRunModel`, its ``network``.
        measure: makes the arguments of a forward.
        size: pixels a side.
        dynamic: let the program take any number of images, of any size that the network takes.

    Raises:
        LoRunError: ``torch.export`` cannot trace the network, or not for other sizes; weights in eight bits.
    """
    check_floats(network, "exported")
    given = measure(size, 2 if dynamic else 1)  # torch.export makes a program for one image if it sees one
    fixed = {place: value for place, value in enumerate(given) if not isinstance(value, PLAIN)}
    arguments = tuple(value for place, value in enumerate(given) if place not in fixed)
    shapes: tuple[Any, ...] | None = None
    if dynamic:
        others = [value for place, value in enumerate(measure(2 * size, 3)) if place not in fixed]
        shapes = _varying(arguments, others)

    def traced(network: nn.Module) -> nn.Module:
        return _Fixed(network, fixed, len(given)) if fixed else network

    def run(network: nn.Module) -> Any:
        with torch.no_grad(), evaluating(network):
            return traced(network)(*arguments)

    try:
        with torch.no_grad(), evaluating(network):
            program = torch.export.export(
                traced(network), arguments, dynamic_shapes=(shapes,) if fixed and shapes else shapes
            )
    except Exception as error:  # torch.export raises many types
        hint = ": leave out dynamic sizes" if dynamic else ": have its forward use nothing but tensors"
        raise LoRunError(
            f"torch.export cannot trace {type(network).__name__} "
            f"({type(error).__name__}: {shortened(str(error))}){hint}"
        ) from error
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)  # names files of this computer, in more bytes than the weights take
    return Exported(program, arguments, run, "network." if fixed else "")


class _Fixed(nn.Module):
    """A network some of whose arguments are always the same."""

    def __init__(self, network: nn.Module, fixed: Mapping[int, Any], count: int) -> None:
        super().__init__()
        self.network, self.count = network, count
        self.modules_fixed = nn.ModuleDict({str(k): v for k, v in fixed.items() if isinstance(v, nn.Module)})
        self.fixed = {place: value for place, value in fixed.items() if not isinstance(value, nn.Module)}

    def forward(self, *arguments: Any) -> Any:
        left = iter(arguments)
        every = []
        for place in range(self.count):
            if str(place) in self.modules_fixed:
                every.append(self.modules_fixed[str(place)])
            else:
                every.append(self.fixed[place] if place in self.fixed else next(left))
        return self.network(*every)


def _varying(arguments: Sequence[Any], others: Sequence[Any]) -> tuple[Any, ...]:
    """For each argument, which of its dimensions depend on the number and size of the images."""
    found: list[Any] = []
    for one, other in zip(arguments, others, strict=True):
        if isinstance(one, Tensor):
            found.append({dim: Dim.AUTO for dim in range(one.dim()) if one.shape[dim] != other.shape[dim]} or None)
        else:
            found.append(None)
    return tuple(found)


def save_program(exported: Exported, path: Path) -> None:
    """Write a program to a file that ``torch.export.load`` reads; it appears whole or not at all."""
    program = copy.copy(exported.program)
    program.example_inputs = None  # they would be pickled
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are views of others, which only matters on a GPU
        torch.export.save(program, content)
    write_file(path, lambda file: file.write(content.getbuffer()))

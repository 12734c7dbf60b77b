"""One table of times and sizes: the plain network, the converted one, and what people would use instead."""

from __future__ import annotations

import copy
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..conversion import convert
from ..errors import LoRunError
from ..files.layout import ADAPTERS_FOLDER
from ..model.lorun_model import LoRunModel
from ..network.adapted import merged_tensors
from ..network.adapter import terms_of
from ..network.calls import CountsCalls
from ..peft_format.options import config_of_ranks
from ..util.copying import copy_network
from ..util.energy import relative_error
from ..util.modules import distinct_tensors
from ..util.nested import tensors_in
from ..util.tables import kilobytes, table
from .alternatives import ALTERNATIVES, PEFT, Unsuited, peft_swaps
from .timing import Times, interleaved

PLAIN, OURS, MERGED = "plain", "ours", "ours merged"
CLOSE = 1e-4  # relative difference of outputs, up to which an alternative computes the same
SMALL = 16  # pixels a side, of the small images
Inputs = Callable[[int, int], tuple[Any, ...]]  # pixels a side and images -> arguments of a forward


@dataclass(frozen=True)
class Row:
    """One line of the table: by column, times, or a number of bytes."""

    name: str
    cells: Mapping[str, Times | int]

    def text(self, column: str) -> str:
        """The cell to print: the plain network's as it is, others as a ratio to it."""
        cell, plain = self.cells.get(column), self.cells.get(PLAIN)
        if cell is None:
            return ""
        if isinstance(cell, int):
            return kilobytes(cell) if column == PLAIN or not plain else f"{cell / _amount(plain):.2f}"
        spread = f" ±{100 * cell.spread:.0f} %"
        ratio = None if plain is None or column == PLAIN else f"{cell.median / _amount(plain):.2f}"
        return (f"{1000 * cell.median:.2f} ms" if ratio is None else ratio) + spread


@dataclass(frozen=True)
class Result:
    """What :func:`bench` found.

    Attributes:
        rows: the measurements.
        missing: the alternatives that are not there, by name, and why.
        setting: what was measured, in one line.
    """

    setting: str
    rows: tuple[Row, ...]
    missing: Mapping[str, str] = field(default_factory=dict)

    def tables(self) -> list[Table]:
        """Return the table: the plain network's medians, and ratios to them."""
        columns = [PLAIN, OURS, MERGED, *(name for name in ALTERNATIVES if name not in self.missing)]
        rows = [(row.name, *(row.text(column) for column in columns)) for row in self.rows]
        return [table(self.setting, ("", *(f"{column}>" for column in columns)), rows)]

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain data: seconds and bytes."""
        rows = {
            row.name: {
                column: cell
                if isinstance(cell, int)
                else {"median": cell.median, "spread": cell.spread, "rounds": len(cell.seconds)}
                for column, cell in row.cells.items()
            }
            for row in self.rows
        }
        return {"setting": self.setting, "rows": rows, "missing": dict(self.missing)}


def bench(
    net: nn.Module, lorun: LoRunModel, inputs: Inputs, *, size: int, device: torch.device, seconds: float = 10.0
) -> Result:
    """Measure a network, its conversion and the alternatives, in turns.

    Args:
        net: the original network.
        lorun: its conversion; its active set is measured. Its modes and sets are as before afterwards.
        inputs: makes the arguments of a forward for so many pixels a side, and so many images.
        size: pixels a side.
        device: where the networks are.
        seconds: for each row, after one warm-up, or three rounds if they take longer; swaps and conversion get a fifth.

    Raises:
        LoRunError: the network cannot run on images of this size.
    """
    net, lorun = copy_network(net), copy.deepcopy(lorun).eval()
    if isinstance(lorun.network, CountsCalls):
        lorun.network.lorun_recomputes = False  # its hooks on saved tensors would hide them from ours
    networks: dict[str, nn.Module] = {PLAIN: net.eval(), OURS: lorun}
    merged = copy.deepcopy(lorun)
    merged.merge_adapter()
    networks[MERGED] = merged
    try:
        example = inputs(size, 1)
        expected = _outputs(lorun, example)
    except RuntimeError as error:
        raise LoRunError(f"the network cannot run on {size}x{size} pixels ({error}): give another --size") from error
    missing: dict[str, str] = {}
    for name, make in ALTERNATIVES.items():
        try:
            network = make(lorun).eval()
            found = _outputs(network, example)
        except Unsuited as error:
            missing[name] = str(error)
        except Exception as error:  # the user's code may raise anything where its modules are replaced
            missing[name] = f"the network does not run with it ({type(error).__name__})"
        else:
            if all(float(relative_error(a, b)) ** 0.5 < CLOSE for a, b in zip(found, expected, strict=True)):
                networks[name] = network
            else:
                missing[name] = "the network computes something else with it"
    rows = [*_inference(networks, inputs, size, device, seconds), *_training(networks, example, device, seconds)]
    rows += [_weights(networks), _saved_for_backward(networks, example, device)]
    rows += _swaps(net, lorun, device, seconds)
    rows.append(_conversion(lorun, net, device, seconds))
    threads = torch.get_num_threads()
    setting = f"{size}x{size} pixels, {device}" + (f", {threads} threads" if device.type == "cpu" else "")
    return Result(setting, tuple(rows), missing)


@torch.no_grad()
def _outputs(network: nn.Module, arguments: tuple[Any, ...]) -> list[Tensor]:
    return tensors_in(network(*arguments))


def _amount(cell: Times | int) -> float:
    return cell.median if isinstance(cell, Times) else cell


def _inference(
    networks: Mapping[str, nn.Module], inputs: Inputs, size: int, device: torch.device, seconds: float
) -> Iterator[Row]:
    for side, batch in ((size, 1), (size, 8), *([(SMALL, 1)] if size > SMALL else [])):
        try:
            arguments = inputs(side, batch)
            _outputs(networks[PLAIN], arguments)
        except Exception:  # the user's network may want larger images, or one at a time
            continue
        calls = {name: partial(_outputs, network, arguments) for name, network in networks.items()}
        yield Row(f"inference, batch {batch}, {side}x{side}", interleaved(calls, seconds, device))


def _training(
    networks: Mapping[str, nn.Module], arguments: tuple[Any, ...], device: torch.device, seconds: float
) -> Iterator[Row]:
    networks = {name: network for name, network in networks.items() if name != MERGED}
    for title, everything in (("training step, all", True), ("training step, low-rank factors only", False)):
        calls = {}
        for name, network in networks.items():
            if everything or name != PLAIN:
                calls[name] = partial(_step, network, arguments, _trained(name, network, everything))
        if not everything:  # what there is to compare with: the plain network trains all that it has
            calls = {PLAIN: partial(_step, networks[PLAIN], arguments, list(networks[PLAIN].parameters())), **calls}
        yield Row(title, interleaved(calls, seconds, device))


def _trained(name: str, network: nn.Module, everything: bool) -> list[nn.Parameter]:
    """All parameters, or the low-rank factors alone."""
    if isinstance(network, LoRunModel):
        if everything:
            return list(network.network.parameters())
        places = network.stage_map.sites.items()
        terms = [term for site, group in places for term in terms_of(network.adapter_of(group, site)).values()]
        return [parameter for term in terms for parameter in term.parameters()]
    if everything:
        return list(network.parameters())
    marks = (".parametrizations.", "lora_")
    return [p for key, p in network.named_parameters() if any(m in key for m in marks) and "original" not in key]


def _step(network: nn.Module, arguments: tuple[Any, ...], trained: list[nn.Parameter]) -> None:
    with _only(network, trained):
        outputs = [output for output in tensors_in(network(*arguments)) if output.requires_grad]
        torch.stack([output.abs().square().mean() for output in outputs]).sum().backward()
        for parameter in trained:
            parameter.grad = None


@contextmanager
def _only(network: nn.Module, trained: list[nn.Parameter]) -> Iterator[None]:
    """Make only these parameters trainable within the block."""
    before = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())
        yield
    finally:
        for parameter, mode in before:
            parameter.requires_grad_(mode)


def _weights(networks: Mapping[str, nn.Module]) -> Row:
    sizes: dict[str, Times | int] = {}
    for name, network in networks.items():
        running = network.network if isinstance(network, LoRunModel) else network
        merged = [tensor for _, tensor in merged_tensors(running)]
        held = network if isinstance(network, LoRunModel) else running  # what the base holds beside, too
        tensors = [*held.parameters(), *held.buffers(), *merged]
        sizes[name] = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    return Row("bytes of weights in memory", sizes)


def _saved_for_backward(networks: Mapping[str, nn.Module], arguments: tuple[Any, ...], device: torch.device) -> Row:
    sizes: dict[str, Times | int] = {}
    for name, network in networks.items():
        if name == MERGED:
            continue
        trained = _trained(name, network, name == PLAIN)
        own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor, saved: dict[int, int] = saved, own: set[int] = own) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with _only(network, trained):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                _step(network, arguments, trained)
                sizes[name] = torch.cuda.max_memory_allocated(device) - before
            else:
                with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                    held = network(*arguments)  # noqa: F841  kept until all is counted, so that no address is used twice
                sizes[name] = sum(saved.values())
    return Row("bytes saved for backward" if device.type != "cuda" else "peak bytes of a training step", sizes)


def _swaps(net: nn.Module, lorun: LoRunModel, device: torch.device, seconds: float) -> Iterator[Row]:
    """Another set for all stages: for the plain network, other weights; and what the files take."""
    name = next(iter(lorun.converted().active.values()))
    lorun.copy_adapter(name, "bench_a")
    lorun.copy_adapter(name, "bench_b")
    sets = itertools.cycle(["bench_a", "bench_b"])
    plain = copy_network(net)
    states = itertools.cycle([copy.deepcopy(net.state_dict()), copy.deepcopy(net.state_dict())])
    lorun.set_adapter("bench_a")
    lorun.set_adapter("bench_b")
    with tempfile.TemporaryDirectory() as scratch:
        file, folder = Path(scratch, "plain.safetensors"), Path(scratch, "saved")
        save_file({key: tensor.contiguous() for key, tensor in distinct_tensors(net).items()}, file)
        lorun.save_pretrained(folder, selected_adapters=[name])

        def load() -> None:
            lorun.load_adapter(folder, "bench_a")
            lorun.set_adapter("bench_a")

        memory: dict[str, Callable[[], object]] = {
            PLAIN: lambda: plain.load_state_dict(next(states)),
            OURS: lambda: lorun.set_adapter(next(sets)),
        }
        disk: dict[str, Callable[[], object]] = {
            PLAIN: lambda: plain.load_state_dict(load_file(file), strict=False),
            OURS: load,
        }
        with suppress(Unsuited):
            memory[PEFT], disk[PEFT] = peft_swaps(lorun, folder / ADAPTERS_FOLDER / name)
        yield Row("swap from memory", interleaved(memory, seconds / 5, device))
        yield Row("swap from disk", interleaved(disk, seconds / 5, device))
        whole = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        one = sum(path.stat().st_size for path in (folder / ADAPTERS_FOLDER).rglob("*.safetensors"))
        dense = file.stat().st_size
    yield Row("files: network and one set", {PLAIN: dense, OURS: whole})
    yield Row("files: each further set", {PLAIN: dense, OURS: one})


def _conversion(lorun: LoRunModel, net: nn.Module, device: torch.device, seconds: float) -> Row:
    """Conversion without data, at the ranks of ``lorun``."""
    ranks: dict[str, int] = {}
    for site, group in lorun.stage_map.sites.items():
        for name, term in terms_of(lorun.adapter_of(group, site)).items():
            ranks[name] = max(term.rank, ranks.get(name, 1))
    arguments = lorun.stage_map.as_arguments()
    call = partial(convert, net, config_of_ranks(ranks), share=lorun.stage_map.shared, **arguments)
    return Row("conversion without data", {OURS: interleaved({OURS: call}, seconds / 5, device)[OURS]})

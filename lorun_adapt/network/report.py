"""The sizes of a network before and after conversion, and the residuals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table
from torch import nn

from ..stages.tensors import base_tensors
from ..util.modules import owner_of, tensor_of
from ..util.tables import kilobytes, plain_text, table
from .adapter import StageAdapter, private_tensors, terms_of
from .converted import Converted


@dataclass(frozen=True)
class Size:
    """Number of parameters (without buffers), and number of bytes (with the buffers that are saved)."""

    num_parameters: int = 0
    num_bytes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.num_parameters + other.num_parameters, self.num_bytes + other.num_bytes)

    def __sub__(self, other: Size) -> Size:
        return Size(self.num_parameters - other.num_parameters, self.num_bytes - other.num_bytes)


@dataclass(frozen=True)
class StageReport:
    """The sizes and residuals of one stage.

    Attributes:
        stage: its number, counted from 0.
        modules: the names of its denoisers.
        before: the size of its denoisers in the original network.
        after: the size of its adapters.
        residuals: for each adapted tensor W, the relative residual at conversion: ||W - W'|| / ||W||, where W' is the
            base plus the stage's term.
    """

    stage: int
    modules: tuple[str, ...]
    before: Size
    after: Size
    residuals: dict[str, float]


@dataclass(frozen=True)
class Report:
    """The sizes before and after conversion; ``print()`` shows them as a table.

    Attributes:
        stages: the sizes and residuals of each stage.
        base: the size of the shared denoisers, without adapters; if they share no base,
            the size of all the original denoisers.
        denoisers_before: the size of all denoisers of the original network.
        denoisers_after: the size of the shared denoisers and the active adapters.
        network_before: the size of the original network.
        network_after: the size of the converted network with its active adapters.
        relative_error: the relative residual at conversion over all adapted tensors: the norm of all differences
            divided by the norm of all tensors.
        num_adapted: the number of tensors that have a low-rank term, summed over the groups.
        num_without_base: the number of these that have no base, as a budget chooses.
        shared: whether the stages share the base.

    >>> import lorun_adapt
    >>> from lorun_adapt.util.toy import ToyUnfoldingNet
    >>> report = lorun_adapt.convert(ToyUnfoldingNet(), rank=1).report()
    >>> report.network_before.num_parameters, report.network_after.num_parameters
    (462, 451)
    """

    stages: tuple[StageReport, ...]
    base: Size
    denoisers_before: Size
    denoisers_after: Size
    network_before: Size
    network_after: Size
    relative_error: float
    num_adapted: int
    num_without_base: int
    shared: bool

    @property
    def base_title(self) -> str:
        """What the base is called in tables."""
        return "shared base" if self.shared else "base of all stages"

    def tables(self) -> list[Table]:
        """Return the report as one table: a row for each stage, the shared base, all denoisers, the whole network."""
        columns = ("stage", "modules", "parameters before>", "after>", "bytes before>", "after>", "largest residual>")
        rows: list[tuple[object, ...]] = []
        for item in self.stages:
            worst = f"{max(item.residuals.values()):.3f}" if item.residuals else "-"
            rows.append((item.stage, ", ".join(item.modules), *_cells(item.before, item.after), worst))
        rows.append(("", self.base_title, *_cells(Size(), self.base), ""))
        rows.append(("", "all denoisers", *_cells(self.denoisers_before, self.denoisers_after), ""))
        rows.append(
            ("", "whole network", *_cells(self.network_before, self.network_after), f"{self.relative_error:.3f}")
        )
        title = ""
        if self.num_without_base:
            title = (
                f"{self.num_without_base} of {self.num_adapted} adapted tensors have no shared base: "
                "a higher rank in each stage keeps more"
            )
        return [table(title, columns, rows)]

    def __str__(self) -> str:
        return plain_text(*self.tables())


def _cells(before: Size, after: Size) -> tuple[str, str, str, str]:
    return (
        f"{before.num_parameters:,}",
        f"{after.num_parameters:,}",
        kilobytes(before.num_bytes),
        kilobytes(after.num_bytes),
    )


def make_report(converted: Converted) -> Report:
    """Compare the base and the active adapters with the original network."""
    stages: dict[int, StageReport] = {}
    base = own = adapters = Size()
    counted: set[tuple[int, str]] = set()  # the original network held a tensor that several stages share only once
    lost = norm = 0.0
    groups, choice = converted.stage_map.groups, converted.choice
    for group in groups:
        first = converted.base.get_submodule(group.sites[0].module)
        base += _sum(
            (spec.numel, tensor_of(first, spec.name).nbytes, spec.buffer)
            for spec in group.tensors
            if not spec.common and not spec.without_base
        )
        for position, site in enumerate(group.sites):
            dense, held = [], []
            denoiser = converted.base.get_submodule(site.module)
            for spec in group.tensors:
                place = owner_of(denoiser, spec.name)
                if not spec.common and place not in counted:
                    counted.add(place)
                    dense.append((spec.numel, spec.numel * spec.dtype.itemsize, spec.buffer))
                    held.append((spec.numel, tensor_of(denoiser, spec.name).nbytes, spec.buffer))
            before, after = _sum(dense), _adapter_size(choice[site.stage][group.name])
            own += _sum(held)
            adapters += after
            residuals = {}
            for name, pairs in converted.residuals.get(group.name, {}).items():
                key = name if len(groups) == 1 else f"{group.name}: {name}"
                residuals[key] = pairs[position][0] / max(pairs[position][1], 1e-30)
                lost, norm = lost + pairs[position][0] ** 2, norm + pairs[position][1] ** 2
            item = stages.get(site.stage, StageReport(site.stage, (), Size(), Size(), {}))
            stages[site.stage] = StageReport(
                site.stage,
                (*item.modules, str(site)),
                item.before + before,
                item.after + after,
                item.residuals | residuals,
            )
    before = sum((item.before for item in stages.values()), Size())
    base = base if converted.stage_map.shared else own
    buffers = {id(buffer) for buffer in converted.base.buffers()}
    tensors = base_tensors(converted.base, converted.stage_map).values()
    whole = _sum((tensor.numel(), tensor.nbytes, id(tensor) in buffers) for tensor in tensors)
    outside = _sum((tensor.numel(), tensor.nbytes, False) for tensor in converted.outside.values())
    return Report(
        tuple(stages[key] for key in sorted(stages)),
        base,
        before,
        base + adapters,
        whole - base + before,
        whole + adapters + outside,
        (lost / norm) ** 0.5 if norm else 0.0,
        sum(len(converted.stage_map.adapted(group)) for group in groups),
        sum(spec.without_base for group in groups for spec in group.tensors),
        converted.stage_map.shared,
    )


def _adapter_size(adapter: StageAdapter) -> Size:
    size = _sum((t.numel(), t.nbytes, not isinstance(t, nn.Parameter)) for t in private_tensors(adapter).values())
    return sum((Size(term.num_parameters, term.num_bytes) for term in terms_of(adapter).values()), size)


def _sum(tensors: Iterable[tuple[int, int, bool]]) -> Size:
    """Return the total size of tensors, given as (number of elements, bytes, whether it is a buffer)."""
    tensors = list(tensors)
    return Size(
        sum(numel for numel, _, buffer in tensors if not buffer),
        sum(nbytes for _, nbytes, _ in tensors),
    )

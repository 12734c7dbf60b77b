"""What a conversion saves and what it loses, in numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from rich.table import Table
from torch import nn

from ..stages.tensors import base_tensors
from ..util.modules import owner_of
from ..util.tables import kilobytes, plain_text, table
from .adapter import StageAdapter, lowrank_terms, private_tensors

if TYPE_CHECKING:
    from ..model.lorun_model import LoRunModel


@dataclass(frozen=True)
class Size:
    """Parameters (buffers not counted) and bytes (buffers that are saved counted)."""

    num_parameters: int = 0
    num_bytes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.num_parameters + other.num_parameters, self.num_bytes + other.num_bytes)

    def __sub__(self, other: Size) -> Size:
        return Size(self.num_parameters - other.num_parameters, self.num_bytes - other.num_bytes)


@dataclass(frozen=True)
class StageReport:
    """One stage: its denoisers before, its adapters after."""

    stage: int
    modules: tuple[str, ...]
    before: Size
    after: Size
    residuals: dict[str, float]  # tensor -> ||W_k - what stands for it|| / ||W_k|| at conversion


@dataclass(frozen=True)
class Report:
    """Sizes before and after; ``print()`` shows a table."""

    stages: tuple[StageReport, ...]
    base: Size  # the shared denoisers, which stand beside the adapters
    denoisers_before: Size
    denoisers_after: Size
    network_before: Size
    network_after: Size
    relative_error: float  # the same over all adapted tensors of all stages

    def tables(self) -> list[Table]:
        columns = ("stage", "modules", "parameters before>", "after>", "bytes before>", "after>", "largest error>")
        rows: list[tuple[object, ...]] = []
        for item in self.stages:
            worst = f"{max(item.residuals.values()):.3f}" if item.residuals else "-"
            rows.append((item.stage, ", ".join(item.modules), *_cells(item.before, item.after), worst))
        rows.append(("", "shared base", *_cells(Size(), self.base), ""))
        rows.append(("", "all denoisers", *_cells(self.denoisers_before, self.denoisers_after), ""))
        rows.append(
            ("", "whole network", *_cells(self.network_before, self.network_after), f"{self.relative_error:.3f}")
        )
        return [table("", columns, rows)]

    def __str__(self) -> str:
        return plain_text(*self.tables())


def _cells(before: Size, after: Size) -> tuple[str, str, str, str]:
    return (
        f"{before.num_parameters:,}",
        f"{after.num_parameters:,}",
        kilobytes(before.num_bytes),
        kilobytes(after.num_bytes),
    )


def make_report(lorun: LoRunModel) -> Report:
    """Count the active adapters of a converted network against the network it came from."""
    stages: dict[int, StageReport] = {}
    base = adapters = Size()
    counted: set[tuple[int, str]] = set()  # what several stages hold, or call, stood once before
    lost = norm = 0.0
    for group in lorun.stage_map.groups:
        base += _sum(
            (spec.numel, spec.dtype, spec.buffer) for spec in group.tensors if not spec.common and not spec.without_base
        )
        for position, site in enumerate(group.sites):
            dense = []
            for spec in group.tensors:
                place = owner_of(lorun.base.get_submodule(site.module), spec.name)
                if not spec.common and place not in counted:
                    counted.add(place)
                    dense.append((spec.numel, spec.dtype, spec.buffer))
            before, after = _sum(dense), _adapter_size(lorun.adapter_of(group, site))
            adapters += after
            residuals = {}
            for name, pairs in lorun.residuals.get(group.name, {}).items():
                key = name if len(lorun.stage_map.groups) == 1 else f"{group.name}: {name}"
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
    buffers = {id(buffer) for buffer in lorun.base.buffers()}
    whole = _sum((t.numel(), t.dtype, id(t) in buffers) for t in base_tensors(lorun.base, lorun.stage_map).values())
    outside = _sum((t.numel(), t.dtype, False) for t in lorun.outside_that_runs().values())
    return Report(
        tuple(stages[key] for key in sorted(stages)),
        base,
        before,
        base + adapters,
        whole - base + before,
        whole + adapters + outside,
        (lost / norm) ** 0.5 if norm else 0.0,
    )


def _adapter_size(adapter: StageAdapter) -> Size:
    factors = [(t.numel(), t.dtype, False) for term in lowrank_terms(adapter).values() for t in term.parameters()]
    private = [(t.numel(), t.dtype, not isinstance(t, nn.Parameter)) for t in private_tensors(adapter).values()]
    return _sum([*factors, *private])


def _sum(tensors: Iterable[tuple[int, torch.dtype, bool]]) -> Size:
    """The size of (numel, dtype, is it a buffer)."""
    tensors = list(tensors)
    return Size(
        sum(numel for numel, _, buffer in tensors if not buffer),
        sum(numel * dtype.itemsize for numel, dtype, _ in tensors),
    )

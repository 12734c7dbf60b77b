"""What the stages of a network are: groups of equal denoisers, where they are, and their tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from rich.table import Table
from torch import nn

from ..util.tables import plain_text, table
from .fold import DEFAULT_RANK, fold, pair_size


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that every stage of a group has, under the same name relative to the denoiser."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    buffer: bool
    aliases: tuple[str, ...]  # all names of the tensor inside the denoiser, `name` first
    owner: type[nn.Module]  # class of the module that holds it
    frozen: bool = False  # the authors don't train it (in a network of which they train something)
    common: bool = False  # the authors tie it, or it is a constant: one for all stages, never adapted
    without_base: bool = False  # it has no base, which is zero then: each stage's low-rank term is the whole tensor

    @property
    def matrix(self) -> tuple[int, int]:
        return fold(self.shape, self.owner if self.name.rpartition(".")[2] == "weight" else None)

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def adaptable(self) -> bool:
        """Whether a low-rank term can stand for it at all."""
        numeric = self.dtype.is_floating_point or self.dtype.is_complex
        # Recurrent layers keep a second list of their weights, which a parametrization would miss.
        return (
            not self.buffer
            and not self.frozen
            and not self.common
            and numeric
            and not issubclass(self.owner, nn.RNNBase)
            and (len(self.shape) >= 2 and self.numel > 0)
        )

    def smaller(self, rank: int) -> bool:
        """Whether a low-rank pair takes less than the dense tensor."""
        return self.adaptable and pair_size(self.matrix, rank) < self.numel


@dataclass(frozen=True)
class Site:
    """Where one stage's denoiser is: a module, or one call of a module that is called in a loop."""

    stage: int
    module: str
    call: int | None = None

    def __str__(self) -> str:
        return self.module if self.call is None else f"{self.module} (call {self.call})"


@dataclass(frozen=True)
class Group:
    """Denoisers that are equal in shape and share one base."""

    name: str
    sites: tuple[Site, ...]
    tensors: tuple[TensorSpec, ...]

    @property
    def num_parameters(self) -> int:
        """Parameters of one denoiser."""
        return sum(spec.numel for spec in self.tensors if not spec.buffer)


@dataclass(frozen=True)
class NotTaken:
    """Modules that look repeated but are left as they are."""

    modules: tuple[str, ...]
    num_parameters: int
    reason: str


@dataclass(frozen=True)
class StageMap:
    """The stages of a network; ``len()`` is their number, ``print()`` shows a table."""

    network: str
    groups: tuple[Group, ...]
    not_taken: tuple[NotTaken, ...] = ()
    ranks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # group -> tensor -> rank, once planned

    def dropping_bases(self, names: Mapping[str, Collection[str]]) -> StageMap:
        """The same, where tensors of these names, by group, have no base."""
        groups = [
            replace(
                group,
                tensors=tuple(replace(spec, without_base=spec.name in names[group.name]) for spec in group.tensors),
            )
            for group in self.groups
        ]
        return replace(self, groups=tuple(groups))

    def __len__(self) -> int:
        return 1 + max(site.stage for group in self.groups for site in group.sites)

    @property
    def num_tensors(self) -> int:
        """How many there are in all stages."""
        return sum(len(group.sites) * len(group.tensors) for group in self.groups)

    def adapted(self, group: Group) -> dict[str, int]:
        """The tensors with a low-rank term, and its rank: as planned, or as by default."""
        if group.name in self.ranks:
            return dict(self.ranks[group.name])
        return {spec.name: DEFAULT_RANK for spec in group.tensors if spec.smaller(DEFAULT_RANK)}

    def tables(self) -> list[Table]:
        rows = []
        for stage in range(len(self)):
            for group in self.groups:
                adapted = self.adapted(group)
                private = sum(not spec.common and spec.name not in adapted for spec in group.tensors)
                rows += [
                    (stage, site, f"{group.num_parameters:,}", len(adapted), private)
                    for site in group.sites
                    if site.stage == stage
                ]
        columns = ("stage>", "module", "parameters>", "adapted>", "private>")
        result = [table(f"{self.network}: {len(self)} stages", columns, rows)]
        if self.not_taken:
            rest = [(abridged(item.modules), f"{item.num_parameters:,}", item.reason) for item in self.not_taken]
            result.append(table("not taken", ("modules", "parameters>", "why"), rest))
        return result

    def __str__(self) -> str:
        return plain_text(*self.tables())


def abridged(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])}, … {names[-1]} ({len(names)})"


def stage_key(stage: int) -> str:
    """A stage's name in attributes and folders."""
    return f"stage_{stage:02d}"

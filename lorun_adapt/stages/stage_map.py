"""The stages of a network as plain data: groups of denoisers built alike, where they are, and their tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from rich.table import Table
from torch import nn

from ..util.numbers import is_numeric
from ..util.tables import plain_text, table
from .fold import DEFAULT_RANK, fold, pair_size


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that every stage of a group has, under the same name relative to the denoiser.

    Attributes:
        name: its first name.
        shape, dtype: the same in all stages.
        buffer: whether it is a persistent buffer, not a parameter.
        aliases: all its names within the denoiser, ``name`` first.
        owner: the class of the module that holds it.
        frozen: it has ``requires_grad=False`` although the network has parameters that train. It is never adapted.
        common: all stages have the same tensor, tied or constant. It is never adapted.
        without_base: it has no base (the base is zero): each stage's low-rank term is the whole tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    buffer: bool
    aliases: tuple[str, ...]
    owner: type[nn.Module]
    frozen: bool = False
    common: bool = False
    without_base: bool = False

    @property
    def matrix(self) -> tuple[int, int]:
        """The (rows, columns) of the matrix that it is folded to."""
        return fold(self.shape, self.owner if self.name.rpartition(".")[2] == "weight" else None)

    @property
    def numel(self) -> int:
        """How many numbers it has, in one stage."""
        return int(torch.Size(self.shape).numel())

    @property
    def adaptable(self) -> bool:
        """Whether it can have a low-rank term at all."""
        # Recurrent layers keep a second list of their weights, which a parametrization would miss.
        return (
            not self.buffer
            and not self.frozen
            and not self.common
            and is_numeric(self.dtype)
            and not issubclass(self.owner, nn.RNNBase)
            and (len(self.shape) >= 2 and self.numel > 0)
        )

    def smaller(self, rank: int) -> bool:
        """Whether it can have a low-rank term of ``rank``, with fewer numbers than the tensor itself."""
        return self.adaptable and pair_size(self.matrix, rank) < self.numel


@dataclass(frozen=True)
class Site:
    """Where one stage's denoiser is: a module, or one call of a module that is called in a loop.

    Attributes:
        stage: the stage's index, from 0.
        module: the module's path in the network.
        call: which of the module's calls in a forward, from 0; None where the module is a stage of its own.

    >>> str(Site(2, "p", 2))
    'p (call 2)'
    """

    stage: int
    module: str
    call: int | None = None

    def __str__(self) -> str:
        return self.module if self.call is None else f"{self.module} (call {self.call})"


@dataclass(frozen=True)
class Group:
    """Denoisers that are built alike and share one base: where they are, and the tensors of each."""

    name: str
    sites: tuple[Site, ...]
    tensors: tuple[TensorSpec, ...]

    @property
    def num_parameters(self) -> int:
        """The number of parameters of one denoiser."""
        return sum(spec.numel for spec in self.tensors if not spec.buffer)


@dataclass(frozen=True)
class NotTaken:
    """Modules or parameters that are in no stage, whether they repeat or not, and why."""

    modules: tuple[str, ...]
    num_parameters: int
    reason: str


@dataclass(frozen=True)
class StageMap:
    """The stages of a network; ``len()`` is their number, ``print()`` shows them in a table.

    Attributes:
        network: the name of the network's class.
        groups: the denoisers that share a base, in the order of the network.
        not_taken: what is in no stage: modules that repeat or are like a stage, and what has over 1 % of parameters.
        ranks: by group and tensor, the ranks of the low-rank terms, once these are planned.
        shared: whether the stages share one base; if not, each stage's base is its own weights.

    >>> spec = TensorSpec("weight", (32, 32, 3, 3), torch.float32, False, ("weight",), nn.Conv2d)
    >>> group = Group("denoiser", (Site(0, "blocks.0"), Site(1, "blocks.1")), (spec,))
    >>> stage_map = StageMap("Net", (group,))
    >>> len(stage_map), stage_map.num_tensors, group.num_parameters, stage_map.adapted(group)
    (2, 2, 9216, {'weight': 8})
    """

    network: str
    groups: tuple[Group, ...]
    not_taken: tuple[NotTaken, ...] = ()
    ranks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    shared: bool = True

    def dropping_bases(self, names: Mapping[str, Collection[str]]) -> StageMap:
        """Return a copy in which the tensors named for each group, and only these, have no base."""
        groups = [
            replace(
                group,
                tensors=tuple(replace(spec, without_base=spec.name in names[group.name]) for spec in group.tensors),
            )
            for group in self.groups
        ]
        return replace(self, groups=tuple(groups))

    def __len__(self) -> int:
        return 1 + max(site.stage for site in self.sites)

    @property
    def sites(self) -> dict[Site, Group]:
        """Every site, in the order of the groups, and the group that it belongs to."""
        return {site: group for group in self.groups for site in group.sites}

    @property
    def num_tensors(self) -> int:
        """The number of tensors in all stages together."""
        return sum(len(group.sites) * len(group.tensors) for group in self.groups)

    def as_arguments(self) -> dict[str, Any]:
        """Return the arguments that make :func:`find_stages` find these stages in a network of the same class.

        >>> StageMap("Net", (Group("denoiser", (Site(0, "p", 0), Site(1, "p", 1)), ()),)).as_arguments()
        {'calls': {'p': 2}}
        """
        looped = [site.module for site in self.sites if site.call is not None]
        calls = {module: looped.count(module) for module in looped}
        modules = [list(dict.fromkeys(site.module for site in group.sites)) for group in self.groups]
        if len(looped) == len(self.sites):
            return {"calls": calls}
        return {"stages": modules, "calls": calls} if calls else {"stages": modules}

    def adapted(self, group: Group) -> dict[str, int]:
        """Return the rank of each tensor with a low-rank term: as planned, or else the default."""
        if group.name in self.ranks:
            return dict(self.ranks[group.name])
        return {spec.name: DEFAULT_RANK for spec in group.tensors if spec.smaller(DEFAULT_RANK)}

    def tables(self) -> list[Table]:
        """Return a table of the stages and, if modules were skipped, a table of them."""
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
    """Return ``names`` in one line, the middle left out where there are more than six.

    >>> abridged([f"blocks.{i}" for i in range(9)])
    'blocks.0, blocks.1, blocks.2, … blocks.8 (9)'
    """
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])}, … {names[-1]} ({len(names)})"


def stage_key(stage: int) -> str:
    """Return a stage's name in attributes and folders.

    >>> stage_key(3)
    'stage_03'
    """
    return f"stage_{stage:02d}"

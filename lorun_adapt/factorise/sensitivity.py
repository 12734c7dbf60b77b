"""How sensitive the output of a network is to changes of each tensor of each stage.

A change E of a tensor changes the output by J E. As in K-FAC (arXiv:1503.05671, section 3), the curvature J^T J is
approximated by a Kronecker product of a factor for the rows and a factor for the columns. These are second moments of
the gradients of random projections of the output, so no ground truth is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..errors import LoRunError
from ..network.recording import Recorder, StageCall
from ..stages.stage_map import StageMap
from ..stages.tensors import stage_parameters
from ..util.copying import copy_network

IN_PLACE = (
    "the network changes a tensor in place that its gradient needs, so it cannot train: use the operation that returns "
    "a new tensor"
)
MAX_SIDE = 1024  # of a moment that is stored; above it, all directions get the same weight


class Sensitivity(NamedTuple):
    """The sensitivity to one tensor, folded to (N, m, n) over N stages.

    A change E of stage k's matrix changes the output by about tr(rows_k E columns_k E^T): its squared relative
    change, up to a factor that is the same for all stages and tensors.

    Attributes:
        rows: (N, m, m), or (N, 1, 1), a multiple of the identity, if m is above 1024.
        columns: (N, n, n), or (N, 1, 1) if n is above 1024.
    """

    rows: Tensor
    columns: Tensor


def sensitivities(
    network: nn.Module,
    stage_map: StageMap,
    outputs: Callable[[nn.Module, tuple[Any, ...], int], Sequence[Tensor]],
    batches: Iterable[tuple[Any, ...]],
    seed: int,
) -> dict[tuple[str, str], Sensitivity]:
    """Estimate the sensitivity to each tensor that a low-rank pair can be smaller than.

    Args:
        network: the original, or a network with the same modules; it is not changed.
        outputs: a function of (network, batch, seed) that runs the network and returns the outputs that count.
        batches: each is used for one random projection.
        seed: of the projections.

    Returns:
        The sensitivities by group and tensor name; empty if there are no batches.
    """
    copied = copy_network(network).requires_grad_(False)
    moments = _Moments(copied, stage_map)
    count = 0
    for count, batch in enumerate(batches if moments.tensors else (), 1):
        with torch.enable_grad():
            output = outputs(copied, batch, seed + count)
            generator = torch.Generator().manual_seed(seed + count)
            projected = cast(Tensor, sum(_projected(tensor, generator) for tensor in output))
        places = [(key, stage) for key, stages in moments.tensors.items() for stage in range(len(stages))]
        moments.add(places, projected)
    return moments.sensitivities(count)


def sensitivities_of_stages(
    recorder: Recorder,
    network: nn.Module,
    stage_map: StageMap,
    recordings: Iterable[Sequence[StageCall]],
    seed: int,
) -> dict[tuple[str, str], Sensitivity]:
    """Estimate how sensitive the outputs of the stages, instead of the network's, are to each stage's own tensors.

    The output of a stage is taken relative to what the stage changes. No gradient passes from one stage to another, so
    this also serves networks whose iteration diverges when their stages change.

    Args:
        recorder: runs single stages.
        network, stage_map, seed: as for :func:`sensitivities`.
        recordings: the calls of the stages in a forward each, as the recorder returns them.

    Returns:
        As :func:`sensitivities`, for the groups whose stages can run alone.
    """
    copied = copy_network(network).requires_grad_(False)
    moments = _Moments(copied, stage_map)
    sites = stage_map.sites
    count = 0
    for count, calls in enumerate(recordings if moments.tensors else (), 1):
        for place, call in enumerate(calls):
            group = sites[call.site]
            own = [(key, group.sites.index(call.site)) for key in moments.tensors if key[0] == group.name]
            if own:
                generator = torch.Generator().manual_seed(seed + count * len(calls) + place)
                with torch.enable_grad():
                    output = recorder.run(copied, call)
                    relative = [_projected(t, generator, math.sqrt(c)) for t, c in zip(output, call.changes)]
                moments.add(own, cast(Tensor, sum(relative)))
    return moments.sensitivities(count)


class _Moments:
    """Sums of the second moments of gradients, for each tensor that a low-rank pair can be smaller than."""

    def __init__(self, network: nn.Module, stage_map: StageMap) -> None:
        places = {
            (group.name, spec.name): (stage_parameters(network, group, spec), spec.matrix)
            for group in stage_map.groups
            for spec in group.tensors
            if spec.smaller(1) and spec.dtype.is_floating_point
        }
        # A tensor that stages share has no residuals to weight.
        places = {key: value for key, value in places.items() if len({id(t) for t in value[0]}) == len(value[0])}
        self.tensors = {key: tensors for key, (tensors, _) in places.items()}
        self._matrices = {key: matrix for key, (_, matrix) in places.items()}
        self._rows: dict[tuple[tuple[str, str], int], Tensor] = {}
        self._columns: dict[tuple[tuple[str, str], int], Tensor] = {}
        for tensors in self.tensors.values():
            for tensor in tensors:
                tensor.requires_grad_(True)

    def add(self, places: Sequence[tuple[tuple[str, str], int]], projected: Tensor) -> None:
        """Add the moments of the gradients of a number with respect to the tensors at ``places``."""
        tensors = [self.tensors[key][stage] for key, stage in places]
        if not projected.requires_grad:
            return
        try:
            gradients = torch.autograd.grad(projected, tensors, allow_unused=True, materialize_grads=True)
        except RuntimeError as error:
            if "inplace operation" in str(error):
                raise LoRunError(IN_PLACE) from error
            raise
        for (key, stage), gradient in zip(places, gradients):
            matrix = gradient.detach().cpu().reshape(self._matrices[key])
            if not bool(torch.isfinite(matrix).all()):
                continue
            for moments, moment in ((self._rows, _moment(matrix)), (self._columns, _moment(matrix.mT))):
                moments[key, stage] = moments.get((key, stage), 0) + moment

    def sensitivities(self, count: int) -> dict[tuple[str, str], Sensitivity]:
        """Return the sensitivities after ``count`` random projections; empty if there are none."""
        if not count:
            return {}
        found = {}
        for key, tensors in self.tensors.items():
            if any((key, stage) in self._rows for stage in range(len(tensors))):
                rows, columns = (self._stacked(moments, key, len(tensors)) for moments in (self._rows, self._columns))
                # The trace of rows (x) columns must be the energy of the gradients.
                found[key] = Sensitivity(rows / count, columns / _trace(columns, self._matrices[key][1]))
        return found

    def _stacked(self, moments: dict[tuple[tuple[str, str], int], Tensor], key: tuple[str, str], num: int) -> Tensor:
        like = next(moment for (other, _), moment in moments.items() if other == key)
        return torch.stack([moments.get((key, stage), torch.zeros_like(like)) for stage in range(num)])


def _projected(tensor: Tensor, generator: torch.Generator, norm: float | None = None) -> Tensor:
    """A random projection of an output, relative to ``norm`` or its own: a number."""
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    direction = torch.randn(values.shape, generator=generator).to(values)
    return (values * direction).sum() / (values.detach().norm().clamp_min(1e-20) if norm is None else norm)


def _moment(matrix: Tensor) -> Tensor:
    """The sum of x x^T over columns x: (m, m), or the mean of its diagonal, (1, 1), if m is above the limit."""
    if len(matrix) <= MAX_SIDE:
        return (matrix @ matrix.mT).double()
    return (matrix.double().square().sum() / len(matrix))[None, None]


def _trace(moment: Tensor, side: int) -> Tensor:
    """The trace of moments of ``side`` rows, (N, 1, 1)."""
    return (moment.diagonal(dim1=1, dim2=2).mean(1) * side).clamp_min(1e-300)[:, None, None]

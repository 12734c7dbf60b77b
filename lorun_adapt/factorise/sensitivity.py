"""How sensitive the output of a network is to changes of each tensor of each stage.

A change E of a tensor changes the output by J E. As in K-FAC (arXiv:1503.05671, section 3), the curvature J^T J is
approximated by a Kronecker product of a factor for the rows and a factor for the columns. These are second moments of
the gradients of random projections of the output, so no ground truth is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..stages.stage_map import StageMap
from ..stages.tensors import stage_parameters
from ..util.modules import copy_network

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
    places = {
        (group.name, spec.name): stage_parameters(copied, group, spec)
        for group in stage_map.groups
        for spec in group.tensors
        if spec.smaller(1) and spec.dtype.is_floating_point
    }
    # A tensor that stages share has no residuals to weight.
    places = {key: tensors for key, tensors in places.items() if len({id(t) for t in tensors}) == len(tensors)}
    matrices = {(g.name, spec.name): spec.matrix for g in stage_map.groups for spec in g.tensors}
    all_tensors = [tensor.requires_grad_(True) for tensors in places.values() for tensor in tensors]
    rows: dict[tuple[str, str], Tensor] = {}
    columns: dict[tuple[str, str], Tensor] = {}
    count = 0
    for count, batch in enumerate(batches if all_tensors else (), 1):
        with torch.enable_grad():
            output = outputs(copied, batch, seed + count)
            generator = torch.Generator().manual_seed(seed + count)
            projected = cast(Tensor, sum(_projected(tensor, generator) for tensor in output))
        gradients = iter(torch.autograd.grad(projected, all_tensors, allow_unused=True))
        for key, tensors in places.items():
            own = [next(gradients) for _ in tensors]
            stack = torch.stack([torch.zeros_like(t) if g is None else g for t, g in zip(tensors, own)])
            stack = stack.detach().cpu().reshape(len(tensors), *matrices[key])
            rows[key] = rows.get(key, 0) + _moment(stack)
            columns[key] = columns.get(key, 0) + _moment(stack.mT)
    # The trace of rows (x) columns must be the energy of the gradients.
    traces = {key: _trace(columns[key], matrices[key][1]) for key in columns}
    return {key: Sensitivity(rows[key] / count, columns[key] / traces[key]) for key in rows}


def _projected(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """A random projection of an output, relative to its norm: a number."""
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    direction = torch.randn(values.shape, generator=generator).to(values)
    return (values * direction).sum() / values.detach().norm().clamp_min(1e-20)


def _moment(stack: Tensor) -> Tensor:
    """The sum of x x^T over columns x: (N, m, m), or the mean of its diagonal, (N, 1, 1), if m is above the limit."""
    if stack.shape[1] <= MAX_SIDE:
        return (stack @ stack.mT).double()
    return stack.double().square().sum((1, 2))[:, None, None] / stack.shape[1]


def _trace(moment: Tensor, side: int) -> Tensor:
    """The trace of moments of ``side`` rows, (N, 1, 1)."""
    return (moment.diagonal(dim1=1, dim2=2).mean(1) * side).clamp_min(1e-300)[:, None, None]

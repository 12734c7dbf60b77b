"""How much the output of a network changes with each tensor of each stage.

A change E of a tensor changes the output by J E. The curvature J^T J is estimated, as in K-FAC
(arXiv:1503.05671, section 3), by a Kronecker product of what rows and columns contribute: the second
moments of gradients of random projections of the output. No ground truth enters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..stages.stage_map import StageMap
from ..stages.tensors import stage_parameters
from ..util.modules import copy_network

LONGEST = 1024  # side of a moment that is kept; on longer ones all directions count alike


class Sensitivity(NamedTuple):
    """For one tensor, folded to (N, m, n) over N stages: ``rows`` (N, m, m) and ``columns`` (N, n, n).

    Either is (N, 1, 1), a multiple of the identity, where its side is above ``LONGEST``.
    The squared relative change of the output with a change E of stage k's matrix is estimated as
    tr(rows_k E columns_k E^T), up to a factor that is the same for all stages and tensors.
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
    """By group and tensor, for each tensor that a low-rank pair can be smaller than.

    Args:
        network: put together like the original; it stays as it is.
        outputs: what of the network's forward counts, for (network, batch, seed).
        batches: each is used for one random projection.
    """
    twin = copy_network(network).requires_grad_(False)
    places = {
        (group.name, spec.name): stage_parameters(twin, group, spec)
        for group in stage_map.groups
        for spec in group.tensors
        if spec.smaller(1) and spec.dtype.is_floating_point
    }
    # One tensor in all stages has no residuals to weigh.
    places = {key: tensors for key, tensors in places.items() if len({id(t) for t in tensors}) == len(tensors)}
    matrices = {(g.name, spec.name): spec.matrix for g in stage_map.groups for spec in g.tensors}
    wanted = [tensor.requires_grad_(True) for tensors in places.values() for tensor in tensors]
    rows: dict[tuple[str, str], Tensor] = {}
    columns: dict[tuple[str, str], Tensor] = {}
    count = 0
    for count, batch in enumerate(batches if wanted else (), 1):
        with torch.enable_grad():
            found = outputs(twin, batch, seed + count)
            generator = torch.Generator().manual_seed(seed + count)
            projected = sum(_projected(tensor, generator) for tensor in found)
        gradients = iter(torch.autograd.grad(projected, wanted, allow_unused=True))
        for key, tensors in places.items():
            own = [next(gradients) for _ in tensors]
            stack = torch.stack([torch.zeros_like(t) if g is None else g for t, g in zip(tensors, own)])
            stack = stack.detach().cpu().reshape(len(tensors), *matrices[key])
            rows[key] = rows.get(key, 0) + _moment(stack)
            columns[key] = columns.get(key, 0) + _moment(stack.mT)
    # rows (x) columns is to have the trace that the gradients' energy asks for.
    traces = {key: _trace(columns[key], matrices[key][1]) for key in columns}
    return {key: Sensitivity(rows[key] / count, columns[key] / traces[key]) for key in rows}


def _projected(tensor: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    direction = torch.randn(values.shape, generator=generator).to(values)
    return (values * direction).sum() / values.detach().norm().clamp_min(1e-20)


def _moment(stack: Tensor) -> Tensor:
    """The sum over columns of x x^T: (N, m, m), or (N, 1, 1) for its mean diagonal where m is too long."""
    if stack.shape[1] <= LONGEST:
        return (stack @ stack.mT).double()
    return stack.double().square().sum((1, 2))[:, None, None] / stack.shape[1]


def _trace(moment: Tensor, side: int) -> Tensor:
    return (moment.diagonal(dim1=1, dim2=2).mean(1) * side).clamp_min(1e-300)[:, None, None]

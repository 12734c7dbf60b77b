"""Split the matrices of N stages into one shared base and a rank-r pair each, without data.

Minimises sum_k ||W_k - W_0 - B_k A_k||^2 by turns. The first turn is the plain "mean, then SVD" of
Relaxed Recursive Transformers (arXiv:2410.20672, section 2.3). In each further turn W_0 becomes
the mean of W_k - B_k A_k, which is best for these pairs, and the pairs follow by a step of subspace
iteration from where they were. Neither can raise the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TURNS = 30
ENOUGH = 1e-3  # stop when a turn lowers the error by less than this part of what it was at first
NOTHING = 1e-24  # of the energy: rounding


@dataclass(frozen=True)
class Factors:
    """``base`` (m, n), ``a`` (N, r, n), ``b`` (N, m, r): stage k is base + b[k] @ a[k]."""

    base: Tensor
    a: Tensor
    b: Tensor
    error: Tensor  # (N,) squared Frobenius norm of what each stage loses

    @property
    def rank(self) -> int:
        return self.a.shape[1]


def factorise(stages: Tensor, rank: int) -> Factors:
    """Factorise ``stages`` of shape (N, m, n); computed in float64 (complex128 for complex)."""
    work = stages.to(torch.complex128 if stages.is_complex() else torch.float64)
    if work.shape[1] > work.shape[2]:
        turned = factorise(work.mT, rank)
        return Factors(turned.base.mT, turned.b.mT, turned.a.mT, turned.error)
    rank = min(rank, work.shape[1])
    base = work.mean(0)
    residual = work - base
    # The pair is kept as an orthonormal basis (N, m, r) of its columns and its coordinates there.
    basis = torch.linalg.eigh(residual @ residual.mH)[1][..., -rank:]
    coordinates = basis.mH @ residual
    error = _lost(residual, coordinates)
    enough = ENOUGH * error.sum()
    for _ in range(TURNS):
        if error.sum() <= NOTHING * _energy(work).sum():
            break
        base = base + (residual - basis @ coordinates).mean(0)
        residual = work - base
        basis = torch.linalg.qr(residual @ (residual.mH @ basis))[0]
        coordinates = basis.mH @ residual
        before, error = error, _lost(residual, coordinates)
        if before.sum() - error.sum() < enough:
            break
    scale = torch.linalg.vector_norm(coordinates, dim=2)
    # Even factors train best; where a coordinate is zero, its basis vector can still train.
    scale = torch.where(scale > 0, scale, 1).sqrt()
    return Factors(base, coordinates / scale[:, :, None], basis * scale[:, None, :], error)


def energy_by_rank(stages: Tensor) -> Tensor:
    """The energy of the residuals from the mean that rank 1, 2, … keeps, over all ``stages`` (N, m, n)."""
    work = stages.to(torch.complex128 if stages.is_complex() else torch.float64)
    residual = work - work.mean(0)
    if work.shape[1] > work.shape[2]:
        residual = residual.mT
    return torch.linalg.eigvalsh(residual @ residual.mH).clamp_min(0).flip(-1).sum(0).cumsum(0)


def _energy(matrices: Tensor) -> Tensor:
    return matrices.abs().square().sum((1, 2))


def _lost(residual: Tensor, coordinates: Tensor) -> Tensor:
    """(N,) what a projection on an orthonormal basis loses."""
    return (_energy(residual) - _energy(coordinates)).clamp_min(0)

"""Split the matrices of N stages into one shared base and a rank-r pair each, without data.

Minimises sum_k ||W_k - W_0 - B_k A_k||^2 by turns. The first turn is the plain "mean, then SVD" of
Relaxed Recursive Transformers (arXiv:2410.20672, section 2.3). In each further turn W_0 becomes
the mean of W_k - B_k A_k, which is best for these pairs, and the pairs follow by a step of subspace
iteration from where they were. Neither can raise the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

TURNS = 30
ENOUGH = 1e-3  # stop when a turn lowers the error by less than this part of what it was at first
WEIGHTED_TURNS = 12
CONJUGATE_STEPS = 40
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


def factorise(stages: Tensor, rank: int, without_base: bool = False) -> Factors:
    """Factorise ``stages`` of shape (N, m, n); computed in float64 (complex128 for complex).

    ``without_base``: with a base of zero, each stage by itself.
    """
    work = stages.to(torch.complex128 if stages.is_complex() else torch.float64)
    if work.shape[1] > work.shape[2]:
        turned = factorise(work.mT, rank, without_base)
        return Factors(turned.base.mT, turned.b.mT, turned.a.mT, turned.error)
    rank = min(rank, work.shape[1])
    base = torch.zeros_like(work[0]) if without_base else work.mean(0)
    residual = work - base
    # The pair is kept as an orthonormal basis (N, m, r) of its columns and its coordinates there.
    basis = torch.linalg.eigh(residual @ residual.mH)[1][..., -rank:]
    coordinates = basis.mH @ residual
    error = _lost(residual, coordinates)
    enough = ENOUGH * error.sum()
    for _ in range(0 if without_base else TURNS):
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


def factorise_weighted(
    stages: Tensor, rank: int, rows: Tensor, columns: Tensor, damping: float, without_base: bool = False
) -> Factors:
    """The same where some directions matter more: minimises sum_k tr(rows_k E_k columns_k E_k^T).

    E_k is what stage k loses. By turns: the pairs by a truncated SVD between the square roots of the
    weights, and W_0 by conjugate gradients.

    Args:
        stages: (N, m, n), real.
        rows, columns: (N, m, m) and (N, n, n), or (N, 1, 1) for multiples of the identity.
        damping: this part of the mean weight is added to each direction, since the weights hold for
            small changes only.
        without_base: with a base of zero.
    """
    if stages.shape[1] > stages.shape[2]:
        turned = factorise_weighted(stages.mT, rank, columns, rows, damping, without_base)
        return Factors(turned.base.mT, turned.b.mT, turned.a.mT, turned.error)
    work = stages.double()
    left, right = _Weight(rows, work.shape[1], damping), _Weight(columns, work.shape[2], damping)
    base = torch.zeros_like(work[0]) if without_base else _nearest(left, right, work, work.mean(0))
    turns = 1 if without_base else WEIGHTED_TURNS
    for turn in range(turns):
        whitened = _whitened(left, right, work - base)
        u = torch.linalg.eigh(whitened @ whitened.mT)[1][..., -rank:]
        b = left.unroot(u)
        a = right.unroot((u.mT @ whitened).mT).mT
        if turn < turns - 1:
            base = _nearest(left, right, work - b @ a, base)
    # Even factors train best: the same product from its own SVD.
    q, r = torch.linalg.qr(b)
    u, s, v = torch.linalg.svd(r @ a, full_matrices=False)
    root = s[:, :rank].sqrt()
    a, b = root[..., None] * v[:, :rank], (q @ u[..., :rank]) * root[:, None]
    return Factors(base, a, b, _energy(work - base - b @ a))


class _Weight:
    """Symmetric matrices (N, m, m), or (N, 1, 1) for multiples of the identity, and their square roots."""

    def __init__(self, matrices: Tensor, side: int, damping: float) -> None:
        mean = matrices.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        self.scalar = matrices.shape[1] < side
        eye = torch.eye(matrices.shape[1], dtype=torch.float64)
        self.matrices = matrices + (damping * mean + 1e-12 * mean.max() + 1e-300) * eye
        values, self.basis = torch.linalg.eigh(self.matrices)
        self.roots = values.clamp_min(1e-300).sqrt()[..., None]

    def times(self, x: Tensor) -> Tensor:
        return self.matrices * x if self.scalar else self.matrices @ x

    def root(self, x: Tensor) -> Tensor:
        return self.roots * x if self.scalar else self.basis @ (self.roots * (self.basis.mT @ x))

    def unroot(self, x: Tensor) -> Tensor:
        return x / self.roots if self.scalar else self.basis @ ((self.basis.mT @ x) / self.roots)


def _whitened(left: _Weight, right: _Weight, matrices: Tensor) -> Tensor:
    """The matrices whose plain energy is the weighted energy of ``matrices``."""
    return right.root(left.root(matrices).mT).mT


def _nearest(left: _Weight, right: _Weight, targets: Tensor, start: Tensor) -> Tensor:
    """The matrix that is nearest to all ``targets`` (N, m, n) in their weights, by conjugate gradients."""

    def weighted(x: Tensor) -> Tensor:
        return right.times(left.times(x).mT).mT

    def summed(x: Tensor) -> Tensor:
        return weighted(x.expand(targets.shape)).sum(0)

    wanted, found = weighted(targets).sum(0), start
    rest = wanted - summed(found)
    direction, size = rest, rest.square().sum()
    for _ in range(CONJUGATE_STEPS):
        if size <= 1e-16 * wanted.square().sum():
            break
        curved = summed(direction)
        step = size / (direction * curved).sum()
        found, rest = found + step * direction, rest - step * curved
        before, size = size, rest.square().sum()
        direction = rest + size / before * direction
    return found


class Energies(NamedTuple):
    """Of all stages: what their base keeps, what rank 1, 2, … adds to it, and what these keep without a base."""

    base: float
    ranks: Tensor
    without_base: Tensor


def energies(stages: Tensor) -> Energies:
    """The energy of ``stages`` (N, m, n), with their mean as the base."""
    work = stages.detach().to(torch.complex128 if stages.is_complex() else torch.float64)
    return _energies(work, work - work.mean(0))


def weighted_energies(stages: Tensor, rows: Tensor, columns: Tensor, damping: float) -> Energies:
    """The same in the weights of :func:`factorise_weighted`, with the matrix that is nearest to all in these."""
    work = stages.detach().double()
    left, right = _Weight(rows, work.shape[1], damping), _Weight(columns, work.shape[2], damping)
    residual = work - _nearest(left, right, work, work.mean(0))
    return _energies(_whitened(left, right, work), _whitened(left, right, residual))


def _energies(whole: Tensor, residual: Tensor) -> Energies:
    ranks = _by_rank(residual)
    return Energies(float((_energy(whole).sum() - ranks.sum()).clamp_min(0)), ranks, _by_rank(whole))


def _by_rank(matrices: Tensor) -> Tensor:
    """The energy of the first, second, … singular value of each matrix, over all (N, m, n)."""
    matrices = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    return torch.linalg.eigvalsh(matrices @ matrices.mH).clamp_min(0).flip(-1).sum(0)


def sum_of_products(products: Sequence[tuple[float, Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    """Factors (m, r) and (r, n) of the sum of ``weight * b @ a`` over ``products``, truncated to ``rank`` by SVD.

    Args:
        products: a weight, ``b`` (m, r_i) and ``a`` (r_i, n) each. Computed on the CPU in float64 (complex128).
    """
    # On the CPU: the matrices are small, and not every accelerator has float64.
    exact = torch.complex128 if products[0][1].is_complex() else torch.float64
    left = torch.cat([weight * b.detach().cpu().to(exact) for weight, b, _ in products], dim=1)
    right = torch.cat([a.detach().cpu().to(exact) for _, _, a in products], dim=0)
    rank = min(rank, left.shape[0], right.shape[1])
    q, r = torch.linalg.qr(left)
    p, s = torch.linalg.qr(right.mH)
    u, values, v = torch.linalg.svd(r @ s.mH, full_matrices=False)
    root = values[:rank].sqrt()
    return (q @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ p.mH)


def rank_for_energy(stages: Tensor, fraction: float) -> int:
    """The smallest rank that keeps ``fraction`` of the energy of the residuals from the mean."""
    energy = energies(stages).ranks.cumsum(0)
    return int((energy < fraction * energy[-1]).sum()) + 1


def _energy(matrices: Tensor) -> Tensor:
    return matrices.abs().square().sum((1, 2))


def _lost(residual: Tensor, coordinates: Tensor) -> Tensor:
    """(N,) what a projection on an orthonormal basis loses."""
    return (_energy(residual) - _energy(coordinates)).clamp_min(0)

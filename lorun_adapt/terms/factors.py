"""Factorise the matrices of N stages into one shared base and a rank-r pair for each stage, without data.

Minimises sum_k ||W_k - W_0 - B_k A_k||^2 by alternating updates. The first iteration is the "mean, then SVD" of
Relaxed Recursive Transformers (arXiv:2410.20672, section 2.3). Each further iteration sets W_0 to the mean of
W_k - B_k A_k, which is optimal for these pairs, and updates the pairs by a step of subspace iteration. Neither
update can increase the error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..util.numbers import double_of

MAX_ITERATIONS = 30
TOLERANCE = 1e-3  # stop when an iteration lowers the error by less than this fraction of the initial error
WEIGHTED_ITERATIONS = 12
CONJUGATE_STEPS = 8
CONJUGATE_TOLERANCE = 1e-6  # of the squared norm of the right side; the pairs change between the calls anyway
ROUNDING = 1e-24  # an error below this fraction of the energy is rounding


@dataclass(frozen=True)
class Factors:
    """A shared base and a low-rank pair for each stage: stage k is approximated by base + b[k] @ a[k].

    Attributes:
        base: (m, n).
        a: (N, r, n).
        b: (N, m, r).
        error: (N,), the squared Frobenius norm of each stage's error.
    """

    base: Tensor
    a: Tensor
    b: Tensor
    error: Tensor

    @property
    def rank(self) -> int:
        return self.a.shape[1]


def factorise(stages: Tensor, rank: int, without_base: bool = False) -> Factors:
    """Factorise the matrices of N stages into a shared base and a pair of rank ``rank`` for each.

    >>> stages = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    >>> factors = factorise(stages, rank=1)
    >>> factors.base.shape, factors.a.shape, factors.b.shape
    (torch.Size([4, 3]), torch.Size([5, 1, 3]), torch.Size([5, 4, 1]))
    >>> errors = (stages - factors.base - factors.b @ factors.a).square().sum((1, 2))
    >>> bool(torch.allclose(errors, factors.error))
    True

    Args:
        stages: (N, m, n), real or complex.
        rank: 1 or more; reduced to min(m, n) if it is above.
        without_base: use a base of zero, so that each stage is approximated by its pair alone.

    Returns:
        Factors in float64, or complex128.
    """
    if stages.shape[1] > stages.shape[2]:
        turned = factorise(stages.mT, rank, without_base)
        return Factors(turned.base.mT, turned.b.mT, turned.a.mT, turned.error)
    exact = double_of(stages)
    rank = min(rank, stages.shape[1])
    # The residual is the only copy of the stages: a network of many parameters would not fit into memory several times.
    residual = stages.to(exact, copy=True)
    base = torch.zeros_like(residual[0]) if without_base else residual.mean(0)
    residual -= base
    # The pair is represented by an orthonormal basis (N, m, r) of its columns and the coordinates in it.
    basis = torch.linalg.eigh(residual @ residual.mH)[1][..., -rank:]
    coordinates = basis.mH @ residual
    error = _lost(residual, coordinates)
    enough = TOLERANCE * error.sum()
    energy = _energy(stages).sum()
    for _ in range(0 if without_base else MAX_ITERATIONS):
        if error.sum() <= ROUNDING * energy:
            break
        # In one product: that of each stage would be a second copy.
        kept = basis.transpose(0, 1).flatten(1) @ coordinates.flatten(0, 1)
        base = base + residual.mean(0) - kept / len(stages)
        residual.copy_(stages).sub_(base)
        basis = torch.linalg.qr(residual @ (residual.mH @ basis))[0]
        coordinates = basis.mH @ residual
        before, error = error, _lost(residual, coordinates)
        if before.sum() - error.sum() < enough:
            break
    scale = torch.linalg.vector_norm(coordinates, dim=2)
    # Factors of equal norm train best; where a coordinate is zero, its basis vector can still train.
    scale = torch.where(scale > 0, scale, 1).sqrt()
    return Factors(base, coordinates / scale[:, :, None], basis * scale[:, None, :], error)


def factorise_weighted(
    stages: Tensor, rank: int, rows: Tensor, columns: Tensor, damping: float, without_base: bool = False
) -> Factors:
    """Factorise with a weighted error: minimise sum_k tr(rows_k E_k columns_k E_k^T), with E_k the error of stage k.

    Alternates between the pairs, by a truncated SVD between the square roots of the weights, and W_0, by conjugate
    gradients.

    >>> stages = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
    >>> first_row = torch.diag(torch.tensor([100.0, 1.0, 1.0, 1.0])).expand(5, 4, 4)  # the first row matters most
    >>> factors = factorise_weighted(stages, 1, first_row, torch.ones(5, 1, 1), damping=0.0)
    >>> error = (stages - factors.base - factors.b @ factors.a).square().sum((0, 2))
    >>> bool(error[0] < 0.1 * error[1:].min())
    True

    Args:
        stages: (N, m, n), real.
        rank: 1 or more.
        rows, columns: symmetric weights (N, m, m) and (N, n, n), or (N, 1, 1) for multiples of the identity.
        damping: this fraction of the mean weight is added to each direction, as the weights hold for small changes
            only.
        without_base: use a base of zero.

    Returns:
        Factors in float64; their ``error`` is not weighted.
    """
    if stages.shape[1] > stages.shape[2]:
        turned = factorise_weighted(stages.mT, rank, columns, rows, damping, without_base)
        return Factors(turned.base.mT, turned.b.mT, turned.a.mT, turned.error)
    work = stages.double()
    left, right = _Weight(rows, work.shape[1], damping), _Weight(columns, work.shape[2], damping)
    base = torch.zeros_like(work[0]) if without_base else _nearest(left, right, work, work.mean(0))
    iterations = 1 if without_base else WEIGHTED_ITERATIONS
    for iteration in range(iterations):
        whitened = _whitened(left, right, work - base)
        u = torch.linalg.eigh(whitened @ whitened.mT)[1][..., -rank:]
        b = left.unroot(u)
        a = right.unroot((u.mT @ whitened).mT).mT
        if iteration < iterations - 1:
            base = _nearest(left, right, work - b @ a, base)
    # Factors of equal norm train best: take them from the SVD of their product.
    q, r = torch.linalg.qr(b)
    u, s, v = torch.linalg.svd(r @ a, full_matrices=False)
    root = s[:, :rank].sqrt()
    a, b = root[..., None] * v[:, :rank], (q @ u[..., :rank]) * root[:, None]
    return Factors(base, a, b, _energy(work - base - b @ a))


class _Weight:
    """Symmetric weights (N, m, m), or (N, 1, 1) for multiples of the identity, and their square roots."""

    def __init__(self, matrices: Tensor, side: int, damping: float) -> None:
        mean = matrices.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        self.scalar = matrices.shape[1] < side
        eye = torch.eye(matrices.shape[1], dtype=torch.float64)
        self.matrices = matrices + (damping * mean + 1e-12 * mean.max() + 1e-300) * eye
        values, self.basis = torch.linalg.eigh(self.matrices)
        self.roots = values.clamp_min(1e-300).sqrt()[..., None]
        mean = self.matrices.mean(0)
        self.mean = mean if self.scalar else torch.linalg.cholesky(mean)

    def times(self, x: Tensor) -> Tensor:
        return self.matrices * x if self.scalar else self.matrices @ x

    def divided_by_mean(self, x: Tensor) -> Tensor:
        return x / self.mean if self.scalar else torch.cholesky_solve(x, self.mean)

    def root(self, x: Tensor) -> Tensor:
        return self.roots * x if self.scalar else self.basis @ (self.roots * (self.basis.mT @ x))

    def unroot(self, x: Tensor) -> Tensor:
        return x / self.roots if self.scalar else self.basis @ ((self.basis.mT @ x) / self.roots)


def _whitened(left: _Weight, right: _Weight, matrices: Tensor) -> Tensor:
    """Matrices whose unweighted energy is the weighted energy of ``matrices``."""
    return right.root(left.root(matrices).mT).mT


def _nearest(left: _Weight, right: _Weight, targets: Tensor, start: Tensor) -> Tensor:
    """The matrix with the least weighted distance to all ``targets`` (N, m, n), by conjugate gradients.

    They are preconditioned by the Kronecker product of the mean weights.
    """

    def weighted(x: Tensor) -> Tensor:
        return right.times(left.times(x).mT).mT

    def preconditioned(x: Tensor) -> Tensor:
        return right.divided_by_mean(left.divided_by_mean(x).mT).mT

    solution = start
    rest = weighted(targets - start).sum(0)
    enough = CONJUGATE_TOLERANCE * weighted(targets).sum(0).square().sum()
    direction = preconditioned(rest)
    size = (rest * direction).sum()
    for _ in range(CONJUGATE_STEPS):
        if rest.square().sum() <= enough:
            break
        curved = weighted(direction.expand(targets.shape)).sum(0)
        step = size / (direction * curved).sum()
        solution, rest = solution + step * direction, rest - step * curved
        improved = preconditioned(rest)
        before, size = size, (rest * improved).sum()
        direction = improved + size / before * direction
    return solution


class Energies(NamedTuple):
    """Energy (squared Frobenius norm) of a tensor, summed over all stages, that a factorisation keeps.

    Attributes:
        base: what the shared base keeps.
        ranks: what the first, second, … rank adds to the base.
        without_base: what the first, second, … rank adds where there is no base.
    """

    base: float
    ranks: Tensor
    without_base: Tensor


def energies(stages: Tensor) -> Energies:
    """The energy that a base and each rank keep of ``stages`` (N, m, n), real or complex; the base is their mean.

    >>> kept = energies(torch.stack([torch.eye(2), torch.diag(torch.tensor([1.0, 3.0]))]))
    >>> kept.base, kept.ranks.tolist(), kept.without_base.tolist()
    (10.0, [2.0, 0.0], [10.0, 2.0])
    """
    work = stages.detach().to(double_of(stages))
    return _energies(work, work - work.mean(0))


def weighted_energies(stages: Tensor, rows: Tensor, columns: Tensor, damping: float) -> Energies:
    """As :func:`energies`, in the weights of :func:`factorise_weighted` and with the base that is best in these."""
    work = stages.detach().double()
    left, right = _Weight(rows, work.shape[1], damping), _Weight(columns, work.shape[2], damping)
    residual = work - _nearest(left, right, work, work.mean(0))
    return _energies(_whitened(left, right, work), _whitened(left, right, residual))


def _energies(whole: Tensor, residual: Tensor) -> Energies:
    ranks = _by_rank(residual)
    return Energies(float((_energy(whole).sum() - ranks.sum()).clamp_min(0)), ranks, _by_rank(whole))


def _by_rank(matrices: Tensor) -> Tensor:
    """The energy of the first, second, … singular value, summed over the matrices (N, m, n)."""
    matrices = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    return torch.linalg.eigvalsh(matrices @ matrices.mH).clamp_min(0).flip(-1).sum(0)


def sum_of_products(products: Sequence[tuple[float, Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    """Factors (m, r) and (r, n) of the sum of ``weight * b @ a`` over ``products``, truncated to ``rank`` by SVD.

    Args:
        products: a weight, ``b`` (m, r_i) and ``a`` (r_i, n) each. Computed on the CPU in float64 (complex128).
    """
    # On the CPU: the matrices are small, and not every accelerator has float64.
    exact = double_of(products[0][1])
    left = torch.cat([weight * b.detach().cpu().to(exact) for weight, b, _ in products], dim=1)
    right = torch.cat([a.detach().cpu().to(exact) for _, _, a in products], dim=0)
    rank = min(rank, left.shape[0], right.shape[1])
    q, r = torch.linalg.qr(left)
    p, s = torch.linalg.qr(right.mH)
    u, values, v = torch.linalg.svd(r @ s.mH, full_matrices=False)
    root = values[:rank].sqrt()
    return (q @ u[:, :rank]) * root, root[:, None] * (v[:rank] @ p.mH)


def rank_for_energy(stages: Tensor, fraction: float) -> int:
    """The smallest rank that keeps ``fraction`` (0..1) of the energy of the residuals from the mean of ``stages``."""
    energy = energies(stages).ranks.cumsum(0)
    return int((energy < fraction * energy[-1]).sum()) + 1


def _energy(matrices: Tensor) -> Tensor:
    exact = double_of(matrices)
    flat = (matrix.flatten().to(exact) for matrix in matrices)  # one at a time, to save memory
    return torch.stack([torch.vdot(matrix, matrix).real for matrix in flat])


def _lost(residual: Tensor, coordinates: Tensor) -> Tensor:
    """(N,), the energy that a projection on an orthonormal basis loses."""
    return (_energy(residual) - _energy(coordinates)).clamp_min(0)

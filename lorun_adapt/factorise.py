"""Split the matrices of N stages into one shared base and a rank-r pair each, without data.

Minimises sum_k ||W_k - W_0 - B_k A_k||^2 by turns: the best pairs for a given W_0 are truncated
singular value decompositions of W_k - W_0, the best W_0 for given pairs is a mean. Neither turn
can raise the error, and the first is the plain "mean, then SVD" of Relaxed Recursive Transformers
(arXiv:2410.20672, section 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TURNS = 30
ENOUGH = 1e-3  # stop when a turn lowers the error by less than this part


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
    rank = min(rank, *work.shape[1:])
    base = work.mean(0)
    best: Factors | None = None
    for _ in range(TURNS):
        b, a = _truncated_svd(work - base, rank)
        terms = b @ a
        error = (work - base - terms).abs().square().sum((1, 2))
        before = best.error.sum() if best is not None else None
        if before is not None and error.sum() >= before:
            break
        best = Factors(base, a, b, error)
        if before is not None and error.sum() > before * (1 - ENOUGH):
            break
        if error.sum() <= 1e-24 * work.abs().square().sum():
            break
        base = (work - terms).mean(0)
    assert best is not None
    return best


def rank_for_energy(stages: Tensor, fraction: float) -> int:
    """The smallest rank that keeps ``fraction`` of the energy of the residuals from the mean."""
    work = stages.to(torch.complex128 if stages.is_complex() else torch.float64)
    energy = torch.linalg.eigvalsh(_gram(work - work.mean(0))).clamp_min(0).flip(-1).sum(0).cumsum(0)
    return int((energy < fraction * energy[-1]).sum()) + 1


def _gram(matrices: Tensor) -> Tensor:
    """The smaller of M M^H and M^H M, whose eigenvalues are the squared singular values."""
    return matrices @ matrices.mH if matrices.shape[1] <= matrices.shape[2] else matrices.mH @ matrices


def _truncated_svd(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best rank-``rank`` pairs (N, m, r) and (N, r, n), with the scale split evenly."""
    _, vectors = torch.linalg.eigh(_gram(matrices))
    top = vectors[..., -rank:].flip(-1)
    # Projecting keeps the product exact whatever the scale; even factors train best.
    if matrices.shape[1] <= matrices.shape[2]:
        a = top.mH @ matrices
        scale = _root(torch.linalg.vector_norm(a, dim=2))
        return top * scale[:, None, :], a / scale[:, :, None]
    b = matrices @ top
    scale = _root(torch.linalg.vector_norm(b, dim=1))
    return b / scale[:, None, :], top.mH * scale[:, :, None]


def _root(size: Tensor) -> Tensor:
    """Square roots to divide by: 1 for what is zero, so that one factor of the pair can still train."""
    return torch.where(size > 0, size, 1).sqrt()

"""Factorisation of a stack of tensors into a base and low-rank terms."""

from __future__ import annotations

import pytest
import torch

from lorun_adapt.terms.factors import factorise, rank_for_energy


def plain_error(stages: torch.Tensor, rank: int) -> float:
    residual = stages.double() - stages.double().mean(0)
    return float(torch.linalg.svdvals(residual)[:, rank:].square().sum())


@pytest.mark.parametrize("shape", [(9, 32, 288), (5, 288, 32), (3, 16, 16)])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_never_worse_than_mean_then_svd(shape, rank) -> None:
    torch.manual_seed(rank)
    stages = torch.randn(shape) + 2 * torch.randn(shape[1:])
    found = factorise(stages, rank)
    restored = found.base + found.b @ found.a
    error = (stages - restored).square().sum((1, 2))
    torch.testing.assert_close(found.error, error, atol=1e-9, rtol=1e-6)
    assert float(error.sum()) <= plain_error(stages, rank) * (1 + 1e-9) + 1e-12
    assert found.a.shape[1] == min(rank, *shape[1:])


def test_alternating_gains_on_low_rank_stages() -> None:
    torch.manual_seed(0)
    stages = torch.randn(20, 20) + torch.randn(4, 20, 3) @ torch.randn(4, 3, 20) * 3
    assert float(factorise(stages, 4).error.sum()) < 0.8 * plain_error(stages, 4)


def test_half_precision_is_factorised_in_better() -> None:
    torch.manual_seed(0)
    stages = torch.randn(4, 16, 40)
    half = factorise(stages.half(), 4)
    assert half.base.dtype == torch.float64
    torch.testing.assert_close(half.error, factorise(stages, 4).error, rtol=1e-2, atol=0)


def test_complex_stages() -> None:
    torch.manual_seed(0)
    stages = torch.randn(4, 8, 20, dtype=torch.complex64)
    full = factorise(stages, 8)
    torch.testing.assert_close((full.base + full.b @ full.a).to(torch.complex64), stages)
    assert factorise(stages, 2).error.dtype == torch.float64


def test_rank_for_energy() -> None:
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(10, 4))[0], torch.linalg.qr(torch.randn(30, 4))[0]
    term = u @ torch.diag(torch.tensor([4.0, 2, 1, 0.5])) @ v.T
    stages = torch.stack([term, -term])
    energy = torch.tensor([16, 4, 1, 0.25]).cumsum(0) / 21.25
    for rank in range(1, 5):
        assert rank_for_energy(stages, float(energy[rank - 1]) - 1e-3) == rank

"""What the output is sensitive to, and factorisation in these terms."""

from __future__ import annotations

import pytest
import torch
from dun_zoo import Block, Denoiser, ListOfBlocks
from torch import Tensor

import lorun_adapt
from lorun_adapt.factorise.sensitivity import sensitivities
from lorun_adapt.network.observe import Observer
from lorun_adapt.terms.factors import factorise, factorise_weighted


def weights(count: int, side: int) -> Tensor:
    """Symmetric, and much larger in some directions than in others."""
    basis = torch.linalg.qr(torch.randn(count, side, side, dtype=torch.float64))[0]
    return (basis * torch.logspace(-3, 1, side, dtype=torch.float64)) @ basis.mT


def weighted_error(stages: Tensor, rows: Tensor, columns: Tensor, factors) -> float:
    lost = stages.double() - factors.base - factors.b @ factors.a
    return float((rows @ lost @ columns * lost).sum())


def test_equal_weights_are_none() -> None:
    stages = torch.randn(4, 6, 10)
    plain = factorise(stages, 2)
    ones = torch.ones(4, 1, 1, dtype=torch.float64)
    for rows, columns in ((ones, ones), (torch.eye(6).double().expand(4, -1, -1), 3 * ones)):
        found = factorise_weighted(stages, 2, rows, columns, 0.0)
        assert float(found.error.sum()) == pytest.approx(float(plain.error.sum()), rel=0.02)


def test_weights_are_minded() -> None:
    stages, rows, columns = torch.randn(4, 6, 10), weights(4, 6), weights(4, 10)
    plain, found = factorise(stages, 2), factorise_weighted(stages, 2, rows, columns, 0.0)
    assert weighted_error(stages, rows, columns, found) < 0.5 * weighted_error(stages, rows, columns, plain)
    assert found.a.shape == plain.a.shape and found.b.shape == plain.b.shape
    torch.testing.assert_close(found.a.norm(dim=2), found.b.norm(dim=1))  # even factors
    exact = factorise_weighted(stages, 6, rows, columns, 0.01)
    torch.testing.assert_close((exact.base + exact.b @ exact.a).float(), stages, atol=1e-4, rtol=1e-4)


def test_stages_that_matter_more_lose_less() -> None:
    stages = torch.randn(3, 6, 10)
    rows = torch.tensor([100.0, 1, 1], dtype=torch.float64)[:, None, None]
    found = factorise_weighted(stages, 1, rows, torch.ones(3, 1, 1, dtype=torch.float64), 0.01)
    assert found.error[0] < 0.1 * found.error[1:].min()


def test_it_predicts_which_change_shows() -> None:
    torch.manual_seed(0)
    net = ListOfBlocks([Block(Denoiser()) for _ in range(3)]).eval()
    stage_map = lorun_adapt.find_stages(net)
    mask = (torch.rand(1, 1, 8, 8) > 0.5).float()
    batches = [(torch.rand(4, 1, 8, 8) * mask, mask) for _ in range(60)]
    observer = Observer(net, stage_map, batches[0])
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    known = sensitivities(net, stage_map, lambda *arguments: observer.run(*arguments).final, batches, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    group = stage_map.groups[0]
    predicted, seen = [], []
    with torch.no_grad():
        output = net(*batches[0])
        for spec in group.tensors:
            if (group.name, spec.name) not in known:
                continue
            rows, columns = known[group.name, spec.name]
            for stage, site in enumerate(group.sites):
                tensor = net.get_submodule(site.module).get_parameter(spec.name)
                change = 1e-3 * torch.randn(spec.matrix)
                kept = tensor.clone()
                tensor.add_(change.view_as(tensor))
                seen.append(float((net(*batches[0]) - output).square().sum() / output.square().sum()))
                tensor.copy_(kept)
                predicted.append(float((rows[stage] @ change.double() @ columns[stage] * change).sum()))
    ratios = torch.tensor(predicted) / torch.tensor(seen)
    assert len(seen) >= 6 and 0.2 < float(ratios.min()) and float(ratios.max()) < 5

"""Batches of crops."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorun_adapt import Crops, LoRunError

TASK = SimpleNamespace(
    patch=8, read=lambda path: torch.full((1, 20, 30), 0.8), measure=lambda images, sigma: (images / 2,)
)


def brightness(crops: Crops, batches: int = 50) -> torch.Tensor:
    """The values of the first crops, one each, as the images are constant."""
    return torch.cat([batch.truth[:, 0, 0, 0] for batch in itertools.islice(crops, batches)])


@pytest.mark.parametrize(
    "options, share",
    [({}, 0.25), ({"sigma": 25}, 0), ({"dimmed": 0}, 0), ({"dimmed": 1}, 1), ({"dimmed": 0.5, "sigma": 25}, 0.5)],
)
def test_a_share_of_the_crops_is_dimmed(options, share) -> None:
    found = brightness(Crops(TASK, [Path("a.png")], size=20, **options))
    dark = found[found < 0.8]
    assert len(dark) / len(found) == pytest.approx(share, abs=0.05)
    if share:
        assert 0.08 <= dark.min() < 0.09 and 0.2 < dark.median() < 0.32  # 0.8 to a tenth of it, evenly in its logarithm
    first, again = (next(iter(Crops(TASK, [Path("a.png")], size=20, **options))) for _ in range(2))
    assert torch.equal(first.truth, again.truth) and torch.equal(first[0], first.truth / 2)


@pytest.mark.parametrize("dimmed", [-0.1, 1.5, "half", True, float("nan")])
def test_a_share_that_is_none_is_an_error(dimmed) -> None:
    with pytest.raises(LoRunError, match="a share of dimmed crops from 0 to 1, found"):
        Crops(TASK, [Path("a.png")], dimmed=dimmed)


def test_no_files_are_an_error() -> None:
    with pytest.raises(LoRunError, match="expected image files to make crops of, found none"):
        Crops(TASK, [])

"""Metrics by name: their values, what they refuse, and where they are shown and kept."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import pytest
import torch
from torch import nn

import lorun_adapt
from lorun_adapt import AdapterInfo, LoRunError, Quality
from lorun_adapt.task import metrics
from lorun_adapt.task.evaluate import evaluate
from lorun_adapt.task.metrics import METRICS, lpips, psnr_y, sam
from lorun_adapt.util.tables import plain_text
from lorun_adapt.util.toy import ToyUnfoldingNet

TRUTH = torch.rand(3, 40, 44, generator=torch.Generator().manual_seed(0))


def a_task(channels: int) -> SimpleNamespace:
    return SimpleNamespace(
        border=2,
        read=lambda path: TRUTH[:channels],
        measure=lambda images, sigma: (images * 0.9,),
        run=lambda net, arguments, images: net(*arguments),
    )


def test_luma_is_a_weighted_sum_of_the_colours() -> None:
    weights = torch.tensor([65.481, 128.553, 24.966])  # ITU-R BT.601, for colours in [0, 1]
    colours = torch.tensor([0.1, -0.05, 0.2])
    error = float(weights @ colours)
    assert psnr_y(TRUTH + colours[:, None, None], TRUTH) == pytest.approx(20 * torch.tensor(255 / error).log10().item())
    changed = TRUTH.clone()
    changed[:, 0] = 0  # within the border
    assert psnr_y(changed, TRUTH, border=1) == float("inf") > psnr_y(changed, TRUTH)
    with pytest.raises(LoRunError, match="psnr_y is for colour images of 3 channels, found 1"):
        psnr_y(TRUTH[:1], TRUTH[:1])


def test_spectral_angles() -> None:
    assert sam(2 * TRUTH, TRUTH) == pytest.approx(0, abs=1e-6)
    truth, image = torch.zeros(2, 2, 2), torch.zeros(2, 2, 2)
    truth[:, 0, 0], image[:, 0, 0] = torch.tensor([1.0, 0]), torch.tensor([1.0, 1])  # 45 degrees
    truth[:, 0, 1] = torch.tensor([1.0, 0])  # restored as black: a right angle
    image[:, 1, 0] = torch.tensor([1.0, 0])  # black in truth: left out, as is the pixel that is black in both
    assert sam(image, truth) == pytest.approx(3 * torch.pi / 8)
    assert sam(image, torch.zeros(2, 2, 2)) == 0
    with pytest.raises(LoRunError, match="sam compares spectra, but the images have 1 channel"):
        sam(TRUTH[:1], TRUTH[:1])


@pytest.fixture
def fresh_lpips():
    metrics._alexnet.cache_clear()
    yield
    metrics._alexnet.cache_clear()


def test_lpips_gets_colours_between_0_and_1_from_one_network(fresh_lpips, monkeypatch) -> None:
    made, seen = [], []

    class Distance(nn.Module):
        def __init__(self, net_type: str, normalize: bool) -> None:
            super().__init__()
            made.append((net_type, normalize))

        def forward(self, image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
            seen.extend([image, truth])
            return (image - truth).abs().mean()

    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", Distance)
    assert lpips(TRUTH + 2, TRUTH, border=2) == pytest.approx(1 - TRUTH[:, 2:-2, 2:-2].mean().item())
    assert lpips(TRUTH[:1], TRUTH[:1]) == 0
    assert made == [("alex", True)]  # torchmetrics: images in [0, 1]
    assert [tuple(image.shape) for image in seen] == [(1, 3, 36, 40)] * 2 + [(1, 3, 40, 44)] * 2
    assert all(0 <= image.min() and image.max() <= 1 for image in seen)
    with pytest.raises(LoRunError, match="lpips is for grey or colour images, found 2 channels"):
        lpips(TRUTH[:2], TRUTH[:2])
    with pytest.raises(LoRunError, match="lpips needs images of at least 41 pixels a side, found 40"):
        lpips(TRUTH, TRUTH, border=5)


def test_what_is_not_installed_is_named(fresh_lpips, monkeypatch) -> None:
    def no_connection(**settings: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", no_connection)
    with pytest.raises(LoRunError, match="cannot download the weights of AlexNet .*no route.*leave lpips out"):
        lpips(TRUTH, TRUTH)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.lpip", None)
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.image", None)
    for metric, name in ((lpips, "lpips"), (sam, "sam")):
        with pytest.raises(LoRunError, match=f"the metric {name} needs torchmetrics.*pip install 'lorun-adapt"):
            metric(TRUTH, TRUTH)


def test_an_evaluation_has_the_metrics_that_are_named() -> None:
    result = evaluate(a_task(3), [Path("a.png")], nn.Identity(), nn.ReLU(), metrics=["sam", "psnr_y", "psnr"])
    names = ["psnr", "ssim", "sam", "psnr_y"]
    assert list(result.mean()) == names + [f"{name}_converted" for name in names]
    for name in names:
        expected = METRICS[name].value(0.9 * TRUTH, TRUTH, 2)
        assert result.mean()[name] == result.mean()[f"{name}_converted"] == expected
    assert result.as_dict()["images"] == [{"name": "a.png", **result.mean()}]
    cells = [f"{result.mean()[name]:.{digits}f}" for name, digits in zip(names, (2, 4, 4, 2))]
    assert ["a.png", *cells, *cells] in [line.split() for line in plain_text(*result.tables()).splitlines()]
    quality = result.quality("colours", 0)
    assert quality.further == quality.further_original == {name: result.mean()[name] for name in names[2:]}
    with pytest.raises(LoRunError, match="no metric 'mse': choose from psnr, ssim, psnr_y, sam, lpips"):
        evaluate(a_task(3), [Path("a.png")], nn.Identity(), None, metrics=["mse"])
    with pytest.raises(LoRunError, match="sam compares spectra"):
        evaluate(a_task(1), [Path("a.png")], nn.Identity(), None, metrics=["sam"])


def test_a_card_shows_them_and_files_keep_them(tmp_path) -> None:
    net = ToyUnfoldingNet()
    lorun = lorun_adapt.convert(net, rank=1)
    measured = Quality("a", 8, 0.0, 30.0, 0.9, further={"sam": 0.08}, further_original={"sam": 0.1})
    lorun.note_quality(measured)
    lorun.note_quality(Quality("b", 8, 0.0, 31.0, 0.9))
    lorun.save_pretrained(tmp_path / "saved")
    assert lorun_adapt.from_pretrained(tmp_path / "saved", net).adapter_info["default"].quality[0] == measured
    for card in (tmp_path / "saved/README.md", tmp_path / "saved/adapters/default/README.md"):
        text = card.read_text()
        assert "| PSNR of the original (dB) | sam | sam of the original |\n" in text
        assert "| 30.00 | 0.9000 |  | 0.0800 | 0.1000 |\n" in text and "| 31.00 | 0.9000 |  |  |  |\n" in text
        assert "type: sam" in text
    for further in ({"SAM": 1.0}, {"sam": float("nan")}, {"a" * 33: 1.0}, dict.fromkeys("abcdefghijklmnopq", 1.0)):
        with pytest.raises(LoRunError, match="finite figures"):
            lorun.note_quality(Quality("a", 8, 0.0, 30.0, 0.9, further=further))


def test_a_metric_draws_no_random_numbers_of_the_measurements(fresh_lpips, monkeypatch) -> None:
    class Distance(nn.Module):
        def __init__(self, **settings: object) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(3))  # as AlexNet does where it is made

        def forward(self, image: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
            return self.weight.sum()

    monkeypatch.setattr("torchmetrics.image.lpip.LearnedPerceptualImagePatchSimilarity", Distance)
    task = a_task(3)
    task.measure = lambda images, sigma: (images + 0.1 * torch.randn_like(images),)
    results = []
    for further in ((), "lpips"):
        torch.manual_seed(0)
        results.append(evaluate(task, [Path("a.png"), Path("b.png")], nn.Identity(), None, metrics=further).mean())
    assert results[0]["psnr"] == results[1]["psnr"] and "lpips" in results[1]
    assert str(lpips(torch.full((3, 40, 40), float("nan")), TRUTH[:, :40, :40])) == "nan"


def test_measurements_of_the_same_images_add_up() -> None:
    info = AdapterInfo()
    for name in ("sam", "lpips"):
        info = info.with_quality(Quality("a", 8, 0.0, 30.0, 0.9, further={name: 0.1}))
    assert info.quality == (Quality("a", 8, 0.0, 30.0, 0.9, further={"sam": 0.1, "lpips": 0.1}),)
    assert len({info, AdapterInfo()}) == 2

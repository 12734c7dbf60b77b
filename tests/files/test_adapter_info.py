"""What is known of a set: saved, loaded, and refused where it is damaged."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fine_tuning_runs import converted, frozen, noisy, same, to_truth

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.files.adapter_info import read_adapter_info
from lorun_adapt.network.converted import AdapterInfo, Quality


def test_it_is_saved_and_loaded(tmp_path) -> None:
    lorun, net = converted()
    assert lorun.finetune(noisy(), "sigma25", sigma=25, steps=3, loss=to_truth)
    lorun.finetune(noisy(), "stages", noise_schedule=[30, 20, 10.5], steps=3, loss=to_truth)
    measured = Quality("photographs", 8, 25.0, 30.5, 0.9)
    lorun.set_adapter("sigma25")
    lorun.note_quality(measured)
    lorun.save_pretrained(tmp_path / "saved")
    expected = {
        "default": AdapterInfo(),
        "sigma25": AdapterInfo(25.0, quality=(measured,)),
        "stages": AdapterInfo(noise_schedule=(30.0, 20.0, 10.5)),
    }
    assert lorun_adapt.from_pretrained(tmp_path / "saved", net).adapter_info == expected
    lorun.load_adapter(tmp_path / "saved/adapters/stages", "again")
    assert lorun.adapter_info["again"] == expected["stages"]
    (tmp_path / "saved/adapters/sigma25").rename(tmp_path / "alone")  # without the folder that knows of it
    lorun.load_adapter(tmp_path / "alone", "alone")
    assert lorun.adapter_info["alone"] == expected["sigma25"]
    assert not (tmp_path / "saved/adapters/default/set_config.json").exists()
    lorun.load_adapter(tmp_path / "alone/stage_00", "alone", stage=0)
    assert lorun.adapter_info["alone"] == AdapterInfo(25.0)  # what was measured was so of other weights


@pytest.mark.parametrize("noise", [np.float32(25), torch.tensor(25), 25, np.int64(25)])
def test_what_is_one_sigma(noise) -> None:
    lorun, _ = converted()
    lorun.set_noise("default", sigma=noise)
    assert lorun.adapter_info["default"] == AdapterInfo(sigma=25.0)
    lorun.set_noise("default", noise_schedule=torch.linspace(1, 3, 3))
    assert lorun.adapter_info["default"].noise_schedule == (1, 2, 3)


@pytest.mark.parametrize("noise", [-1, float("nan"), float("inf"), True, "25", [1, 2], [1, 2, 3, 4], [1, 2, -3], []])
def test_what_is_no_noise(noise) -> None:
    lorun, _ = converted()
    before = frozen(lorun)
    with pytest.raises(LoRunError, match="one sigma of 0 or more for the measurements, or 3"):
        lorun.set_noise("default", sigma=noise)
    with pytest.raises(LoRunError, match="one sigma of 0 or more for the measurements, or 3"):
        lorun.finetune(noisy(), "new", noise_schedule=noise, steps=3, loss=to_truth)
    for one, several in ((None, 25), ([1, 2, 3], None), (25, [1, 2, 3])):
        with pytest.raises(LoRunError, match="pass it as (sigma|noise_schedule)=|not both"):
            lorun.set_noise("default", sigma=one, noise_schedule=several)
        with pytest.raises(LoRunError, match="pass it as (sigma|noise_schedule)=|not both"):
            lorun.finetune(noisy(), "new", sigma=one, noise_schedule=several, steps=3, loss=to_truth)
    assert lorun.adapter_info == {"default": AdapterInfo()} and same(frozen(lorun), before)
    with pytest.raises(LoRunError, match="no adapter set 'other'"):
        lorun.set_noise("other", sigma=1)


GOOD = {"noise_schedule": 25.0, "measured": [vars(Quality("a", 1, 0.0, 1.0, 1.0, further={"sam": 0.1}))]}


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        {},
        {**GOOD, "more": 1},
        {**GOOD, "noise_schedule": "x"},
        {**GOOD, "noise_schedule": [1.0]},
        {**GOOD, "noise_schedule": -1},
        {**GOOD, "measured": {}},
        {**GOOD, "measured": [1]},
        {**GOOD, "measured": GOOD["measured"] * 101},
        {**GOOD, "measured": [{**GOOD["measured"][0], "images": "x" * 201}]},
        {**GOOD, "measured": [{**GOOD["measured"][0], "count": 0}]},
        {**GOOD, "measured": [{**GOOD["measured"][0], "psnr": None}]},
        {**GOOD, "measured": [dict(reversed(GOOD["measured"][0].items())) | {"psnr": None}]},
        {**GOOD, "measured": [{**GOOD["measured"][0], "psnr": "1"}]},
        {**GOOD, "measured": [{**GOOD["measured"][0], "psnr": 10**400}]},
        {**GOOD, "measured": [{**GOOD["measured"][0], "images": "\ud800"}]},
        {**GOOD, "measured": [{**GOOD["measured"][0], "further": None}]},
        {**GOOD, "measured": [{**GOOD["measured"][0], "further": {"sam": None}}]},
        {**GOOD, "measured": [{**GOOD["measured"][0], "further_original": {"a|b": 1.0}}]},
        {**GOOD, "measured": [{**GOOD["measured"][0], "more": {}}]},
    ],
)
def test_damage_is_refused(wrong) -> None:
    assert read_adapter_info(json.dumps(GOOD).encode(), 3, "here").sigma == 25
    backwards = {**GOOD, "measured": [dict(reversed(GOOD["measured"][0].items()))]}
    expected = Quality("a", 1, 0.0, 1.0, 1.0, further={"sam": 0.1})
    assert read_adapter_info(json.dumps(backwards).encode(), 3, "here").quality == (expected,)
    with pytest.raises(LoRunError, match="here has an invalid '"):
        read_adapter_info(json.dumps(wrong).encode(), 3, "here")


def test_a_measurement_takes_the_place_of_the_same() -> None:
    about = AdapterInfo()
    for psnr in (1.0, 2.0):
        for sigma in (0.0, 25.0):
            about = about.with_quality(Quality("a", 8, sigma, psnr, 1.0))
    assert [(m.sigma, m.psnr) for m in about.quality] == [(0, 2), (25, 2)]


def test_all_that_is_noted_can_be_read(tmp_path) -> None:
    lorun, net = converted()
    lorun.set_noise("default", noise_schedule=[1 / 3] * 3)
    for i in range(120):
        lorun.note_quality(Quality(200 * "é", 8, i / 7, 1 / 3, 1 / 3, 1 / 3, 1 / 3))
    for psnr in (float("inf"), float("nan")):
        with pytest.raises(LoRunError, match="finite figures"):
            lorun.note_quality(Quality("a", 8, 0.0, psnr, 1.0))
    lorun.save_pretrained(tmp_path / "saved")
    assert len(lorun_adapt.from_pretrained(tmp_path / "saved", net).adapter_info["default"].quality) == 100
    lorun.card = lorun_adapt.Card(license="a\nb")
    with pytest.raises(LoRunError, match="short lines of printable text"):
        lorun.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_quality_is_that_of_the_weights() -> None:
    lorun, net = converted()
    lorun.note_quality(Quality("a", 8, 0.0, 30.0, 1.0))
    lorun.recover(net, [batch[:2] for batch in noisy(4)], steps=1)
    assert lorun.adapter_info["default"].quality == ()

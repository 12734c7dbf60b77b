"""Recovery of published networks that differ, where their weights and images are at hand."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import pytest
import torch

import lorun_adapt
from lorun_adapt import Crops
from lorun_adapt.task.evaluate import evaluate
from lorun_adapt.task.task import load_task

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("ISTA_NET_PLUS", "OPINE_NET_PLUS", "MRI_ISTA_NET_PLUS", "TRAIN400", "BSD68", "BRAIN")
DATA = {name: Path(os.environ[name]) for name in NAMES if name in os.environ}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(len(DATA) < len(NAMES), reason=f"{', '.join(NAMES)} do not all name the data"),
]


@pytest.mark.parametrize(
    ("network", "seconds", "most_lost"),
    [
        ("ista_net_plus", 10, None),
        ("opine_net_plus", 10, None),
        ("mri_ista_net_plus", 10, None),
        ("ista_net_plus", 60, 1.0),
        ("opine_net_plus", 60, 2.0),
        ("mri_ista_net_plus", 60, 6.0),
    ],
)
def test_recovery_of_published_networks(network: str, seconds: int, most_lost: float | None) -> None:
    """No run ends below its start or late; a minute comes near the original; the sampling matrix stays as it is."""
    task = load_task(str(EXAMPLES / f"{network}.py"))
    net = task.build()
    task.load_weights(net, None)
    mri = network.startswith("mri")
    calibration = DATA["BRAIN"] / "calibration" if mri else DATA["TRAIN400"]
    judged = task.images(DATA["BRAIN"] / "judge")[:3] if mri else task.images(DATA["BSD68"])[:8]
    before = evaluate(task, judged, net, lorun_adapt.convert(net, rank=8)).mean()
    outside = {name: tensor.clone() for name, tensor in net.state_dict().items() if not name.startswith("fcs.")}
    assert outside.keys() == ({"Phi", "Phi_scale"} if network.startswith("opine") else set())
    crops = Crops(task, task.images(calibration))
    started = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ten seconds may find nothing better
        lorun = lorun_adapt.convert(net, rank=8, calibration=crops, minutes=seconds / 60)
    assert time.monotonic() - started < 1.1 * seconds + 5  # a step may end after the time
    scores = evaluate(task, judged, net, lorun).mean()
    assert scores["psnr_converted"] >= before["psnr_converted"] - 0.01
    if most_lost is not None:
        assert scores["psnr_converted"] > scores["psnr"] - most_lost
    merged = lorun.merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in outside.items())

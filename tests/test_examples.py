"""The reference network, the demo and, where its data is at hand, the published network."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import camera
from test_task import call

import lorun_adapt
from lorun_adapt.demo import shipped
from lorun_adapt.evaluate import evaluate
from lorun_adapt.task import load_task

EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS = ("linear estimate", "original", "rank 8, as converted", "rank 8, recovered")
PUBLISHED = os.environ.get("ISTA_NET_PLUS")
JUDGED = os.environ.get("BSD68")
needs_data = pytest.mark.skipif(not PUBLISHED or not JUDGED, reason="ISTA_NET_PLUS and BSD68 do not name the data")


def test_demo(tmp_path, capsys, monkeypatch) -> None:
    code, out, _ = call(capsys, monkeypatch, "demo", "--out", tmp_path / "new")
    assert code == 0 and "UnfoldedISTA: 9 stages" in out
    scores = {
        name: float(line.split()[-2]) for line in out.splitlines() for name in ROWS if line.strip().startswith(name)
    }
    assert len(scores) == 4 and scores["rank 8, as converted"] < scores["original"] - 1
    assert scores["linear estimate"] < scores["original"] - 0.2 <= scores["rank 8, recovered"]
    picture = np.asarray(Image.open(tmp_path / "new/demo.png"))
    assert picture.shape[0] > 700 and picture.shape[1] > 1400 and picture.std() > 30
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["demo.png"]


def test_reference_network() -> None:
    task = load_task(str(shipped("examples/compressive_sensing.py")))
    net = task.build()
    task.load_weights(net, None)
    phi = task.module.sampling_matrix()
    torch.testing.assert_close(phi @ phi.T, torch.eye(272), atol=1e-5, rtol=0)
    energy, lost = 0.0, 0.0
    for spec in lorun_adapt.find_stages(net).groups[0].tensors:
        stack = torch.stack([stage.get_parameter(spec.name) for stage in net.stages]).detach()
        energy, lost = energy + float(stack.square().sum()), lost + float((stack - stack.mean(0)).square().sum())
    assert lost > 0.5 * energy  # honestly separate stages
    photograph = torch.from_numpy(camera()) / 255
    images = torch.stack([photograph[100:170, 200:240], photograph[300:370, 100:140]])[
        :, None
    ]  # no multiple of the block
    (y,) = task.measure(images)
    assert y.shape == (2, 272, 3, 2)
    with torch.no_grad():
        restored = task.module.restore(net(y), images)
    estimate = task.module.restore(task.module.first_estimate(y), images)
    assert (restored - images).square().mean() < (estimate - images).square().mean()


def test_training_goes_on_from_its_checkpoint(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import train_compressive_sensing as train

    (tmp_path / "images").mkdir()
    Image.fromarray(np.tile(np.arange(120, dtype=np.uint8) * 2, (120, 1))).save(tmp_path / "images/a.png")
    out = tmp_path / "net.safetensors"
    arguments = ["train", str(tmp_path / "images"), "--batch", "1", "--out", str(out), "--minutes"]
    original = train.task.build
    monkeypatch.setattr(train.task, "build", lambda: train.task.UnfoldedISTA(stages=2, width=4))

    monkeypatch.setattr(sys, "argv", [*arguments, "0.02"])
    monkeypatch.setattr(train, "save_file", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train.main()
    assert out.with_suffix(".checkpoint").exists() and not out.exists()
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(train.task, "build", lambda: train.task.UnfoldedISTA(stages=2, width=4))
    monkeypatch.setattr(sys, "argv", [*arguments, "0.03"])
    train.main()
    assert out.exists() and not out.with_suffix(".checkpoint").exists()
    assert original is not train.task.build


@needs_data
def test_published_network(tmp_path, capsys, monkeypatch) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for file in sorted(Path(JUDGED).glob("*.png"))[:6]:
        (images / file.name).symlink_to(file)
    task = EXAMPLES / "ista_net_plus.py"
    code, out, _ = call(capsys, monkeypatch, "convert", task, "--rank", 8, "--out", tmp_path / "out")
    assert code == 0 and "fcs.8" in out
    code, out, _ = call(
        capsys, monkeypatch, "eval", task, "--converted", tmp_path / "out", "--images", images, "--json"
    )
    result = json.loads(out)
    assert result["parameters"] == 336_978 and result["parameters_converted"] <= 136_000
    assert 28.7 < result["mean"]["psnr"] < 30 and 20 < result["mean"]["psnr_converted"] < result["mean"]["psnr"]

    spec = load_task(str(task))
    net = spec.build()
    spec.load_weights(net, None)
    full = lorun_adapt.convert(net, rank=28)  # the last rank at which the large kernels are adapted
    assert set(full.stage_map.ranks["denoiser"]) == {
        f"conv{k}_{way}" for k in (1, 2) for way in ("forward", "backward")
    }
    file = spec.images(images)[0]
    scores = evaluate(spec, [file], net, full.merge_and_unload()).images[0]
    assert abs(scores.psnr - scores.psnr_converted) < 0.5
    fresh = spec.build()
    fresh.load_state_dict(full.merge_and_unload().state_dict(), strict=True)


@needs_data
@pytest.mark.slow
def test_quality_floors() -> None:
    for name, floor in (("ista_net_plus", 29.2), ("compressive_sensing", 28.8)):
        task = load_task(str(EXAMPLES / f"{name}.py"))
        net = task.build()
        task.load_weights(net, None)
        assert evaluate(task, task.images(Path(JUDGED)), net, None).mean()["psnr"] > floor

"""The tasks of other fields: their physics, and every command on them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from tasks import EXAMPLES, call, run_example

import lorun_adapt
from lorun_adapt.task.task import load_task

FIELDS = ("spectral_imaging", "super_resolution", "mri")

pytestmark = pytest.mark.filterwarnings("ignore")


def module(name: str):
    return load_task(str(EXAMPLES / f"{name}.py")).module


def test_the_camera_of_spectral_imaging(tmp_path: Path) -> None:
    task = module("spectral_imaging")
    x, mask = torch.rand(2, 28, 12, 16, dtype=torch.float64), task.window(12, 16).double()
    y = task.camera(x, mask)
    assert y.shape == (2, 12, 16 + 54) and set(mask.unique().tolist()) == {0, 1}
    z = torch.rand_like(y)
    torch.testing.assert_close((y * z).sum(), (x * task.camera_transposed(z, mask)).sum())
    overlap = task.camera(mask.expand(1, 28, 12, 16), mask)
    torch.testing.assert_close(task.camera(task.camera_transposed(z, mask), mask), overlap * z)
    one_band = torch.zeros(1, 28, 12, 16, dtype=torch.float64)
    one_band[:, 5] = x[:1, 5]
    torch.testing.assert_close(task.camera(one_band, mask)[..., 10:26], x[:1, 5] * mask)  # two pixels a band
    assert torch.equal(task.window(256, 256), task.aperture()) and task.window(300, 20).shape == (300, 20)
    blurred = task.aperture("blurred")
    assert 0 < blurred.mean() < task.aperture().mean() and 0 <= blurred.min() and 0.5 < blurred.max() <= 1
    np.save(tmp_path / "mask.npy", blurred.numpy()[:200])
    assert torch.equal(task.aperture(str(tmp_path / "mask.npy")), blurred[:200])
    np.save(tmp_path / "mask.npy", 255 * blurred.numpy())
    with pytest.raises(ValueError, match=r"expected a mask \(H, W\) in \[0, 1\]"):
        task.aperture.__wrapped__(str(tmp_path / "mask.npy"))


def test_a_darker_camera_needs_no_other_spectral_network() -> None:
    task = module("spectral_imaging")
    torch.manual_seed(0)
    net, mask = task.build().double(), task.aperture("blurred")[:12, :16].double()
    torch.nn.init.normal_(net.mu)  # training may take them anywhere
    y = task.camera(torch.rand(1, 28, 12, 16, dtype=torch.float64), mask)
    with torch.no_grad():
        torch.testing.assert_close(net(0.2 * y, 0.2 * mask), net(y, mask))
        torch.nn.init.zeros_(net.mu)
        torch.testing.assert_close(net(0.2 * y, 0.2 * mask), net(y, mask))
        assert net(0 * y, 0 * mask).isfinite().all()


@pytest.mark.parametrize("scale", [2, 3])
def test_the_data_step_of_super_resolution_is_the_minimum(scale: int) -> None:
    task = module("super_resolution")
    x, kernel = torch.rand(1, 3, 24, 36, dtype=torch.float64), task.kernel().double()
    y, z = task.degrade(x, kernel, scale), torch.rand_like(x)
    transfer = task.transfer_function(kernel, 24, 36)
    found = task.data_step(z, y, transfer, scale, torch.tensor(0.3)).requires_grad_()
    error = (y - task.degrade(found, kernel, scale)).square().sum() + 0.3 * (found - z).square().sum()
    (gradient,) = torch.autograd.grad(error, found)
    assert gradient.abs().max() < 1e-6
    shifted = task.degrade(x.roll((scale, 2 * scale), (2, 3)), kernel, scale)
    torch.testing.assert_close(shifted, y.roll((1, 2), (2, 3)))
    flat = torch.full((1, 3, 24, 36), 0.4)
    torch.testing.assert_close(task.degrade(flat, task.kernel(), scale), flat[..., ::scale, ::scale])


@pytest.mark.parametrize("pattern", ["cartesian", "radial"])
@pytest.mark.parametrize("acceleration", [4, 8])
def test_what_the_scanner_reads(pattern: str, acceleration: int) -> None:
    task = module("mri")
    mask = task.sampling_mask(96, 128, acceleration, pattern)
    assert mask.shape == (1, 1, 96, 128) and mask.mean() == pytest.approx(1 / acceleration, rel=0.1)
    assert bool(mask[0, 0, 48, 64]) and torch.equal(
        mask, task.sampling_mask.__wrapped__(96, 128, acceleration, pattern)
    )
    images = torch.rand(2, 1, 96, 128)
    complex_images = task.with_phase(images)
    torch.testing.assert_close(task.restore(complex_images, images), images)
    assert complex_images[:, 1].abs().mean() > 0.01
    with pytest.raises(ValueError, match="expected 'cartesian' or 'radial'"):
        task.sampling_mask(8, 8, 4, "spiral")


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    (tmp_path / "photographs").mkdir()
    for name in ("astronaut", "camera", "chelsea", "coffee", "rocket"):
        Image.fromarray(getattr(data, name)()).save(tmp_path / f"photographs/{name}.png")
    return tmp_path / "photographs"


def test_synthetic_cubes_have_many_components(photographs: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import spectral_cubes

    arguments = ["spectral_cubes", str(photographs), str(tmp_path / "cubes"), "--count", "24", "--side", "48"]
    monkeypatch.setattr("sys.argv", arguments)
    spectral_cubes.main()
    task = load_task(str(EXAMPLES / "spectral_imaging.py"))
    cubes = torch.stack([task.read(path) for path in task.images(tmp_path / "cubes")])
    assert cubes.shape == (24, 28, 48, 48) and cubes.max() == 1 and 0.05 < cubes.mean() < 0.5
    energy = torch.linalg.svdvals(cubes.movedim(1, -1).reshape(-1, 28).double()).square().cumsum(0)
    assert int((energy < 0.999 * energy[-1]).sum()) + 1 >= 8
    first = (tmp_path / "cubes/scene000.npy").read_bytes()
    spectral_cubes.main()
    assert (tmp_path / "cubes/scene000.npy").read_bytes() == first
    monkeypatch.setattr("sys.argv", [*arguments, "--side", "4000"])
    with pytest.raises(SystemExit, match="no photograph of 4000 or more pixels"):
        spectral_cubes.main()


@pytest.mark.slow
@pytest.mark.parametrize("field", FIELDS)
def test_every_command(field: str, tmp_path: Path, capsys, monkeypatch) -> None:
    file, images = EXAMPLES / f"{field}.py", tmp_path / "images"
    images.mkdir()
    np.save(tmp_path / "aperture.npy", np.random.default_rng(1).random((16, 20), np.float32))  # as large as the cubes,
    monkeypatch.setenv("SPECTRAL_IMAGING_APERTURE", str(tmp_path / "aperture.npy"))  # so no part is drawn at random
    task, rng = load_task(str(file)), np.random.default_rng(0)
    for k in range(3):
        if field == "spectral_imaging":
            np.save(images / f"{k}.npy", rng.random((16, 20, 28), np.float32))
        else:
            shape = (33, 40, 3) if field == "super_resolution" else (32, 40)
            Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(images / f"{k}.png")
    torch.manual_seed(0)
    net = task.build()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    given, shown = ("--weights", tmp_path / "net.pth"), ("--images", images)

    def run(command: str, *arguments: object) -> str:
        code, out, err = call(capsys, monkeypatch, command, *arguments)
        assert code == 0, err
        return out

    assert f"{len(lorun_adapt.find_stages(net, example_inputs=task.example_inputs()))} stages" in run("inspect", file)
    made = ("--converted", tmp_path / "made")
    run(
        "convert", file, *given, "--rank", 4, "--calibration", images, "--steps", 3, "--batch", 2,
        "--out", tmp_path / "made",
    )  # fmt: skip
    metric = {"spectral_imaging": ("--metric", "sam"), "super_resolution": ("--metric", "psnr_y"), "mri": ()}[field]
    result = json.loads(run("eval", file, *given, *made, *shown, *metric, "--json"))
    assert all(np.isfinite(value) for value in result["mean"].values()) and len(result["images"]) == 3
    beside = run_example("classic_methods.py", monkeypatch, capsys, file, images, *given, *made, *metric)
    table = beside.splitlines()
    if field == "spectral_imaging":
        run_example("spectra.py", monkeypatch, capsys, *given, *made, "--out", tmp_path / "spectra.png")
        assert Image.open(tmp_path / "spectra.png").size[0] > 1000
    names = ["first estimate", *["GAP-TV"] * (field == "spectral_imaging"), "network", "converted"]
    assert [line.split(" | ")[0] for line in table[2:]] == [f"| {name}" for name in names]
    assert float(table[-2].split(" | ")[1]) == pytest.approx(result["mean"]["psnr"], abs=0.1)
    tuned = ("--sigma", 10, "--adapter-name", "sigma10", "--out", tmp_path / "tuned")
    run("finetune", file, *made, *shown, *tuned, "--steps", 2, "--batch", 1)
    run("restore", file, "--converted", tmp_path / "tuned", *shown, "--out", tmp_path / "restored")
    assert len(list((tmp_path / "restored").iterdir())) == 3
    run("report", tmp_path / "tuned", "--task", file, *given, *shown, "--out", tmp_path / "page.html")
    assert "data:image/webp" in (tmp_path / "page.html").read_text()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lorun = lorun_adapt.convert(net, rank=2, share=False, example_inputs=task.example_inputs())
    arguments = task.measure(task.read(task.images(images)[0])[None])
    with torch.no_grad():
        torch.testing.assert_close(lorun(*arguments), net(*arguments))


@pytest.mark.slow
def test_adapters_add_to_a_loop(photographs: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    file = EXAMPLES / "super_resolution.py"
    torch.manual_seed(0)
    torch.save(load_task(str(file)).build().state_dict(), tmp_path / "net.pth")
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        Image.open(photographs / f"{name}.png").resize((60, 52)).save(photographs / f"{name}.png")
    (photographs / "camera.png").unlink()
    arguments = [file, photographs, "--judge", photographs, "--weights", tmp_path / "net.pth", "--steps", 3]
    out = run_example("adapters_for_a_loop.py", monkeypatch, capsys, *arguments)
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == [
        "as published",
        "network trained on",
        "adapters alone",
        "network and adapters",
    ]
    sizes = [int(row[1].replace(",", "")) for row in rows[2:]]
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3] < 1.15 * sizes[0] + 1000
    assert max(float(row[2]) for row in rows[3:]) > float(rows[2][2])


@pytest.fixture
def train(tmp_path: Path, monkeypatch, capsys) -> Callable[..., torch.nn.Module]:
    """Trains the network for MRI, which has parameters under two names, for a second; returns what it wrote."""
    images, out, task = tmp_path / "images", tmp_path / "net.safetensors", load_task(str(EXAMPLES / "mri.py"))
    images.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40), np.uint8)).save(images / "a.png")

    def trained(*arguments: object, again: bool = False) -> torch.nn.Module:
        given = [EXAMPLES / "mri.py", images, "--out", out, "--batch", 1, "--minutes", 0.02, *arguments]
        run_example("train.py", monkeypatch, capsys, *given, *(("--weights", out) if again else ()))
        net = task.build()
        task.load_weights(net, out)
        return net

    return trained


def test_training_starts_from_given_weights(train) -> None:
    first = train()
    same = train("--peak", 0, again=True)
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), same.state_dict().values()))
    further = train(again=True)
    assert not torch.equal(further.prior[0].denoiser.in_conv.weight, first.prior[0].denoiser.in_conv.weight)


def test_tied_stages_train_as_one(train) -> None:
    start, trained = (
        [prior.denoiser.in_conv.weight for prior in train("--tied", *options).prior] for options in (("--peak", 0), ())
    )
    assert all(torch.equal(kernel, start[0]) for kernel in start)
    assert all(torch.equal(kernel, trained[0]) for kernel in trained) and not torch.equal(trained[0], start[0])

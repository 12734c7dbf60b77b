"""The reference network, the demo and, where its data is at hand, the published network."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from skimage.data import camera
from tasks import EXAMPLES, GREY_TASK, call, run_example

import lorun_adapt
from lorun_adapt.cli.demo import DEFAULT, DEMOS, shipped
from lorun_adapt.cli.main import DEMOS as OFFERED
from lorun_adapt.factorise import weigh
from lorun_adapt.task.evaluate import evaluate
from lorun_adapt.task.task import load_task
from lorun_adapt.terms.registry import TERMS

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


def scores_of_demo(field: str, first: str, rows: tuple[str, ...], folder: Path, capsys, monkeypatch) -> list[float]:
    """Run a demo, look at its picture, and return the PSNR of its rows."""
    code, out, err = call(capsys, monkeypatch, "demo", "--task", field, "--out", folder)
    assert code == 0, err
    scores = {row: float(line.split()[-2]) for line in out.splitlines() for row in (first, *rows) if row in line}
    picture = np.asarray(Image.open(folder / f"demo_{field}.png"))
    assert picture.shape[0] > 700 and picture.shape[1] > 380 * (2 + len(rows)) and picture.std() > 30
    return [scores[row] for row in (first, *rows)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:deepinv")
@pytest.mark.parametrize(
    "field, first, gain", [("spectral_imaging", "smoothed projections", 0.5), ("mri", "zero-filled", 4)]
)
def test_demos_of_other_fields(field: str, first: str, gain: float, tmp_path, capsys, monkeypatch) -> None:
    rows = ("original", "as converted", "recovered")
    start, original, converted, recovered = scores_of_demo(field, first, rows, tmp_path, capsys, monkeypatch)
    assert original > start + 4 and recovered > original - 1
    assert recovered > converted + gain


@pytest.mark.filterwarnings("ignore::UserWarning:deepinv")
@pytest.mark.parametrize(
    "field, variable, value, name",
    [
        ("spectral_imaging", "SPECTRAL_IMAGING_APERTURE", "blurred", "blurred"),
        ("mri", "MRI_ACCELERATION", "8", "acceleration8"),
    ],
)
def test_sets_for_other_cameras(field: str, variable: str, value: str, name: str, monkeypatch) -> None:
    monkeypatch.setenv(variable, value)
    task, scene = load_task(str(EXAMPLES / f"{field}.py")), DEMOS[field].scene()[None]
    net = task.build()
    task.load_weights(net, None)
    lorun = lorun_adapt.from_pretrained(shipped(f"adapters/{field}"), net).eval()
    torch.manual_seed(0)
    arguments = task.measure(scene)

    def quality(network) -> float:
        return lorun_adapt.psnr(task.run(network, arguments, scene)[0], scene[0])

    assert lorun.active_adapters == ["default"] and lorun.adapter_info[name].sigma is None
    before = quality(lorun)
    lorun.set_adapter(name)
    assert quality(lorun) > max(before, quality(net)) + 0.6


def test_demo_of_super_resolution(tmp_path, capsys, monkeypatch) -> None:
    rows = ("original", "trained for the noise")
    bicubic, original, tuned = scores_of_demo("super_resolution", "bicubic", rows, tmp_path, capsys, monkeypatch)
    assert tuned > bicubic + 2 and tuned > original + 8  # which was trained without noise


def test_every_demo_is_offered() -> None:
    assert OFFERED == tuple(DEMOS) and OFFERED[0] == DEFAULT


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
    import train

    (tmp_path / "images").mkdir()
    Image.fromarray(np.tile(np.arange(120, dtype=np.uint8) * 2, (120, 1))).save(tmp_path / "images/a.png")
    out = tmp_path / "net.safetensors"
    task = tmp_path / "small.py"
    task.write_text(
        f"import sys; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "from compressive_sensing import UnfoldedISTA, measure, patch, restore\n"
        "def build(): return UnfoldedISTA(stages=2, width=4)\n"
    )
    arguments = ["train", str(task), str(tmp_path / "images"), "--batch", "1", "--out", str(out), "--minutes"]

    monkeypatch.setattr(sys, "argv", [*arguments, "0.005"])
    with monkeypatch.context() as within, pytest.raises(KeyboardInterrupt):
        within.setattr(train, "save_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        train.main()
    assert not out.exists()
    saved = torch.load(out.with_suffix(".checkpoint"), weights_only=True)

    done: list[float] = []  # with a learning rate of 0 from here on, the weights stay those of the checkpoint
    monkeypatch.setattr(train, "learning_rate", lambda share, peak: done.append(share) or 0.0)
    monkeypatch.setattr(sys, "argv", [*arguments, "0.01"])
    train.main()
    assert done[0] >= 0.5 and f"{saved['steps'] + len(done)} steps" in capsys.readouterr().out
    trained = load_file(out)
    assert trained.keys() == saved["net"].keys()
    assert all(torch.equal(tensor, saved["net"][name]) for name, tensor in trained.items())
    assert not out.with_suffix(".checkpoint").exists()


# --- short scripts -------------------------------------------------------------------------------


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Eight crops."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for i in range(8):
        Image.fromarray(camera()[40 * i : 40 * i + 120, 50 * i : 50 * i + 120]).save(folder / f"{i}.png")
    return folder


def reference(folder: Path) -> lorun_adapt.LoRunModel:
    return lorun_adapt.from_pretrained(folder, load_task(str(shipped("examples/compressive_sensing.py"))).build())


def test_example_convert(photographs, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(weigh, "PROBES", 0)  # it takes long to find what the output is sensitive to
    out = run_example("convert.py", monkeypatch, capsys, photographs, "--minutes", 0.05, "--out", tmp_path / "out")
    assert "UnfoldedISTA: 9 stages" in out and "shared base" in out
    assert len(reference(tmp_path / "out").stage_map) == 9


def test_example_download(hub, monkeypatch, capsys) -> None:
    reference(shipped("adapters/compressive_sensing")).push_to_hub("alice/cs", token="alice-token")
    out = run_example("download.py", monkeypatch, capsys, "alice/cs")
    scores = {line.split(":")[0]: float(line.split()[1]) for line in out.splitlines()}
    assert set(scores) == {"default", "sigma10", "sigma25", "sigma50"}
    found = [scores[name] for name in ("default", "sigma10", "sigma25", "sigma50")]
    assert 40 > found[0] and found == sorted(found, reverse=True) and found[-1] > 20  # more and more noise
    assert hub.downloads


@pytest.mark.slow
def test_example_swap(monkeypatch, capsys) -> None:
    out = run_example("swap.py", monkeypatch, capsys)
    rows = [line.split() for line in out.splitlines()[1:-1]]
    assert [int(row[0]) for row in rows] == [0, 10, 20, 30, 40, 45]
    gains = [float(row[3]) - float(row[1]) for row in rows]
    assert gains[0] > -0.3 and all(gain > 0.5 for gain in gains[2:]) and gains[-1] > 3
    assert "interpolated" in out and "8: 'sigma25'" in out.splitlines()[-1]


def test_example_finetune(photographs, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    run_example("finetune.py", monkeypatch, capsys, photographs, "--sigma", 35, "--minutes", 0.05, "--out", out)
    lorun = reference(out)
    assert lorun.adapter_names[-1] == "sigma35-own" and lorun.adapter_info["sigma35-own"].sigma == 35
    assert lorun.adapter_names[:-1] == reference(shipped("adapters/compressive_sensing")).adapter_names


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a task file of a small network, its weights and a few images."""
    (tmp_path / "task.py").write_text(GREY_TASK)
    torch.save(load_task(str(tmp_path / "task.py")).build().state_dict(), tmp_path / "net.pth")
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.fromarray(camera()[40 * i : 40 * i + 40, 50 * i : 50 * i + 40]).save(tmp_path / f"images/{i}.png")
    return tmp_path


@pytest.mark.slow
def test_table_of_noise_levels(small, monkeypatch, capsys) -> None:
    """On a small network and for no time."""
    tmp_path, images = small, small / "images"
    net = load_task(str(tmp_path / "task.py")).build()
    lorun_adapt.convert(net, rank=2).save_pretrained(tmp_path / "net")
    out = run_example(
        "noise_levels.py", monkeypatch, capsys, tmp_path / "task.py", images, "--converted", tmp_path / "net",
        "--judge", images, "--weights", tmp_path / "net.pth", "--minutes", 0.02, "--out", tmp_path / "out",
        "--names", "low", "middle", "high",
    )  # fmt: skip
    assert [line.split()[1] for line in out.splitlines()[-3:]] == ["10", "25", "50"]
    assert "| between the sets for 10 and 50 |" in out and "bytes in float16" in out
    assert lorun_adapt.from_pretrained(tmp_path / "out", net).adapter_names[1:] == ["low", "middle", "high"]


@pytest.mark.slow
def test_comparison_of_methods(small, monkeypatch, capsys) -> None:
    """On a small network and for no time: each way keeps to the bytes of the first."""
    out = run_example(
        "compare_methods.py", monkeypatch, capsys, small / "task.py", small / "images", "--judge", small / "images",
        "--weights", small / "net.pth", "--budgets", 0.8, "--minutes", 0.01,
    )  # fmt: skip
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| ")]
    names = [
        "ranks",
        "magnitude",
        "a base and",
        "a base, low-rank",
        "each stage",
        "mean, rank",
        "one denoiser",
        "PEFT's",
    ]
    assert len(rows[2:]) == len(names) and all(row[0].startswith(name) for row, name in zip(rows[2:], names))
    sizes = [int(row[1].replace(",", "")) for row in rows[2:]]
    assert sizes[1] <= sizes[0] and sizes[6] < sizes[0] and all(0 < float(row[2]) < 100 for row in rows[2:])


def test_bytes_and_quality(small, monkeypatch, capsys) -> None:
    """On a small network and for no time: rows of each way and number of bits, and a picture of them."""
    task = load_task(str(small / "task.py"))
    net = task.build()
    task.load_weights(net, small / "net.pth")
    lorun_adapt.convert(net, rank=2).save_pretrained(small / "converted")
    results, picture = small / "sizes.jsonl", small / "sizes.png"
    out = run_example(
        "bytes_and_quality.py", monkeypatch, capsys, small / "task.py", "--weights", small / "net.pth", "--judge",
        small / "images", "--converted", small / "converted", "--prune", small / "images", "--shares", 0.5,
        "--minutes", 0.01, "--results", results, "--plot", picture,
    )  # fmt: skip
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["bits"] for row in rows] == 3 * [32, 16, 8] and len({row["way"] for row in rows}) == 3
    assert len([line for line in out.splitlines() if line.startswith("| task |")]) == len(rows)
    for way in (rows[:3], rows[3:6], rows[6:]):
        assert way[0]["bytes"] > way[1]["bytes"] > way[2]["bytes"] and abs(way[0]["psnr"] - way[2]["psnr"]) < 1
    assert rows[0]["psnr"] == rows[0]["original"] and rows[0]["bytes"] == rows[0]["whole"] > rows[6]["bytes"]
    with Image.open(picture) as drawn:
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(drawn.width * drawn.height)}
    assert {(31, 119, 180), (255, 127, 14), (44, 160, 44)} <= colours  # a line for each way


def test_curves(small, monkeypatch, capsys) -> None:
    """A few points; what is done is not measured again."""
    results, picture = small / "curves.jsonl", small / "curves.png"
    arguments = (
        "curves.py", monkeypatch, capsys, "--results", results, "--plot", picture, "--repeats", 1, "--stages",
        "--channels", 16, "--rank", "--size", 16, "--processes",
    )  # fmt: skip
    out = run_example(*arguments)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert rows == [json.loads(line) for line in out.splitlines()] and len(rows) == 3
    assert all(value > 0 for row in rows for value in row["values"].values())
    assert 0.2 < rows[0]["values"]["bytes"] < 0.3  # 9 stages of rank 8 and a base
    with Image.open(picture) as drawn:
        assert (31, 119, 180) in {colour for _, colour in drawn.convert("RGB").getcolors(drawn.width * drawn.height)}
    assert run_example(*arguments) == ""


@pytest.mark.slow
def test_throughput_of_recovery(small, monkeypatch, capsys) -> None:
    arguments = ("--stages", "--channels", "--rank", "--size", "--repeats", 1, "--processes", 2)
    run_example("curves.py", monkeypatch, capsys, "--results", small / "curves.jsonl", *arguments)
    rows = [json.loads(line) for line in (small / "curves.jsonl").read_text().splitlines()]
    assert [row["setting"] for row in rows][1:] == [{"processes": 2}] and rows[1]["values"]["images"] > 1


def test_study_of_the_base(small, monkeypatch, capsys) -> None:
    """Of all ways, on a small network and for no time: budgets are kept, and what is done is not done again."""
    monkeypatch.setitem(TERMS, "SCALED", None)  # the script's own kind of term, which goes with this test
    results = small / "results.jsonl"
    arguments = (
        "does_the_base_pay.py", monkeypatch, capsys, "run", small / "task.py", small / "images", "--judge",
        small / "images", "--weights", small / "net.pth", "--results", results, "--shares", 0.9, "--steps", 5,
    )  # fmt: skip
    out = run_example(*arguments)
    assert "'way': 'several bases'" in out and "two or more stages" in out  # there are only three
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert [row["way"] for row in rows] == ["none", "base", "scales", "tie first", "gradual"]
    total = sum(parameter.numel() for parameter in load_task(str(small / "task.py")).build().parameters())
    assert all(0.5 * total < row["parameters"] <= 0.9 * total for row in rows)
    assert all(0 < row["psnr"] < 100 for row in rows) and len({row["psnr"] for row in rows}) == 5
    assert not list(results.with_suffix("").iterdir())  # nothing unfinished
    run_example(*arguments)
    assert len(results.read_text().splitlines()) == 5
    picture = small / "base.png"
    out = run_example("does_the_base_pay.py", monkeypatch, capsys, "show", results, "--plot", picture, "--pace", 150)
    with Image.open(picture) as drawn:
        colours = {colour for _, colour in drawn.convert("RGB").getcolors(drawn.width * drawn.height)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # the lines of the first ways
    assert [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")][2:] == [
        row["way"] for row in rows
    ]


def test_table_of_ranks(small, monkeypatch, capsys) -> None:
    arguments = (small / "task.py", small / "images", "--weights", small / "net.pth", "--ranks", 1, 2)
    out = run_example("table_of_ranks.py", monkeypatch, capsys, *arguments)
    assert [line.split("|")[1].strip() for line in out.splitlines()[2:]] == ["original", "1", "2"]


def test_examples_import_only_what_is_exported() -> None:
    for file in EXAMPLES.glob("*.py"):
        if file.name == "does_the_base_pay.py":  # it studies how the package itself should convert
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lorun_adapt":
                assert node.module == "lorun_adapt", file
                assert {alias.name for alias in node.names} <= set(lorun_adapt.__all__), file
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("lorun_adapt.") for alias in node.names), file
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lorun_adapt":
                assert node.attr in lorun_adapt.__all__, (file, node.attr)


def test_noise_that_the_reference_network_estimates() -> None:
    task = load_task(str(shipped("examples/compressive_sensing.py")))
    image = torch.from_numpy(camera())[None, None] / 255
    for sigma in (0, 5, 10, 25, 50):
        torch.manual_seed(0)
        assert task.noise_level(task.measure(image, sigma)) == pytest.approx(sigma, rel=0.1, abs=3)


@pytest.mark.slow
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
    scores = evaluate(spec, [file], net, full.merge_and_unload()).mean()
    assert abs(scores["psnr"] - scores["psnr_converted"]) < 0.5
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

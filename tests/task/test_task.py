"""Task files, checkpoints as they are found, and the command line."""

from __future__ import annotations

import json
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tasks import COLOUR_TASK, call, run
from torch import nn

from lorun_adapt import LoRunError
from lorun_adapt.task.evaluate import psnr, ssim
from lorun_adapt.task.task import load_task
from lorun_adapt.task.weights import read_state_dict
from lorun_adapt.util.nested import to_device


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    (tmp_path / "my_task.py").write_text(COLOUR_TASK)
    return tmp_path / "my_task.py"


@pytest.fixture
def weights(task_file: Path, tmp_path: Path) -> Path:
    state = load_task(str(task_file)).build().state_dict()
    torch.save({"epoch": 3, "state_dict": {f"module.{name}": t for name, t in state.items()}}, tmp_path / "net.pth")
    return tmp_path / "net.pth"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, size in (("b.png", (20, 31)), ("a.JPG", (17, 16))):
        smooth = generator.random((4, 4, 3)) * 255
        Image.fromarray(smooth.astype(np.uint8)).resize(size[::-1]).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_from_checkpoint_to_scores(task_file, weights, images, tmp_path, capsys, monkeypatch) -> None:
    code, out, _ = call(capsys, monkeypatch, "inspect", task_file, "--weights", weights)
    assert code == 0 and "Colour: 3 stages" in out and "net.blocks.2" in out and "\x1b" not in out
    code, out, _ = call(
        capsys,
        monkeypatch,
        "convert",
        task_file,
        "--weights",
        weights,
        "--rank",
        2,
        "--out",
        tmp_path / "out",
        "--stages",
        "net.blocks.*",
    )
    assert code == 0 and "whole network" in out and (tmp_path / "out/base.safetensors").exists()
    code, out, _ = call(
        capsys,
        monkeypatch,
        "eval",
        task_file,
        "--weights",
        weights,
        "--converted",
        tmp_path / "out",
        "--images",
        images,
        "--sigma",
        5,
        "--json",
    )
    result = json.loads(out)
    assert code == 0 and set(result) == {"images", "mean", "parameters", "parameters_converted"}
    assert [entry["name"] for entry in result["images"]] == ["a.JPG", "b.png"]
    keys = {"psnr", "ssim", "psnr_converted", "ssim_converted"}
    assert set(result["mean"]) == keys and set(result["images"][0]) == keys | {"name"}
    for key in keys:
        assert result["mean"][key] == pytest.approx(np.mean([entry[key] for entry in result["images"]]))
    net = load_task(str(task_file)).build()
    assert result["parameters"] == sum(p.numel() for p in net.parameters()) > result["parameters_converted"]
    code, out, _ = call(capsys, monkeypatch, "eval", task_file, "--converted", tmp_path / "out", "--images", images)
    assert code == 0 and "mean" in out and "a.JPG" in out


def test_recovery_on_the_command_line(task_file, weights, images, tmp_path, capsys, monkeypatch) -> None:
    (tmp_path / "images/c.png").write_bytes((images / "b.png").read_bytes())
    given = (task_file, "--weights", weights, "--calibration", images, "--steps", 12)
    code, out, err = call(capsys, monkeypatch, "convert", *given, "--budget", 0.9, "--out", tmp_path / "whole")
    assert code == 0 and "whole network" in out and "left out" not in err and "12/12" in err
    code, _, _ = call(
        capsys, monkeypatch, "convert", task_file, "--weights", weights, "--rank", 1, "--out", tmp_path / "a"
    )
    assert code == 0
    more = ("--converted", tmp_path / "a", "--out", tmp_path / "b", "--batch", 2)
    code, out, _ = call(capsys, monkeypatch, "recover", *given, *more)
    assert code == 0 and f"saved to {tmp_path / 'b'}" in out
    code, _, _ = call(
        capsys, monkeypatch, "recover", *given, *more[:2], "--out", tmp_path / "c", "--truth", "--sigma", 5
    )
    assert code == 0
    psnr = {}
    for name in ("a", "b", "c"):
        code, out, _ = call(
            capsys, monkeypatch, "eval", task_file, "--weights", weights, "--converted", tmp_path / name,
            "--images", images, "--json",
        )  # fmt: skip
        psnr[name] = json.loads(out)["mean"]["psnr_converted"]
    assert psnr["c"] > psnr["a"]  # the truth says more about the truth than an untrained teacher does
    page = ("--task", task_file, "--weights", weights, "--images", images, "--out", tmp_path / "page.html")
    code, _, err = call(capsys, monkeypatch, "report", tmp_path / "b", *page)
    assert code == 0, err
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/webp;base64") == 18 and "<svg" in text and "http" not in text
    assert "a.JPG" in text and "denoiser.<wbr>body.<wbr>weight</th>" in text


def test_mistakes_in_training_options(task_file, weights, images, tmp_path, capsys, monkeypatch) -> None:
    given = ("convert", task_file, "--weights", weights, "--out", tmp_path / "out")
    for arguments, message in (
        (("--minutes", 3), "without --calibration"),
        (("--calibration", images), "neither"),
        (("--calibration", images, "--minutes", 3, "--steps", 3), "both"),
        (("--calibration", images, "--minutes", -3), "above 0"),
        (("--calibration", tmp_path / "none", "--minutes", 3), "folder of images"),
        (("--calibration", images, "--steps", 3, "--rank", 2, "--budget", 0.5), "one of"),
    ):
        code, _, err = call(capsys, monkeypatch, *given, *arguments)
        assert code == 2 and message in err and not (tmp_path / "out").exists()


def test_several_patterns(task_file, capsys, monkeypatch) -> None:
    patterns = ("net.blocks.*.denoiser.head", "net.blocks.*.denoiser.body")
    for arguments in (("--stages", *patterns, "--seed", 1), ("--stages", patterns[0], "--stages", patterns[1])):
        code, out, _ = call(capsys, monkeypatch, "inspect", task_file, *arguments)
        assert code == 0 and "net.blocks.2.denoiser.head" in out and "net.blocks.2.denoiser.body" in out


def test_the_same_seed_the_same_noise(task_file, weights, images, capsys, monkeypatch) -> None:
    arguments = ("eval", task_file, "--weights", weights, "--images", images, "--sigma", 20, "--json", "--seed")
    first, again, other = (call(capsys, monkeypatch, *arguments, seed)[1] for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["inspect", "nothing.py"], "no task file at nothing.py"),
        (["inspect", "no.such.module"], "ModuleNotFoundError"),
        (["inspect", "{task}", "--weights", "nothing.pth"], "no weights file at nothing.pth"),
        (["inspect", "{task}", "--stages", "fcs.*"], "matches 'fcs.*'"),
        (["convert", "{task}", "--out", "x"], "no weights for"),
        (["convert", "{task}", "--weights", "{weights}", "--out", "{images}"], "found other files"),
        (["convert", "{task}", "--weights", "{weights}", "--rank", "0", "--out", "x"], "rank"),
        (["convert", "{task}", "--weights", "{weights}", "--rank", "many", "--out", "x"], "not a valid integer"),
        (["convert", "{task}", "--weights", "{weights}", "--out", "x", "--device", "cuda:77"], "device"),
        (["eval", "{task}", "--weights", "{weights}", "--images", "nothing"], "no folder of images"),
        (["eval", "{task}", "--weights", "{weights}", "--images", "{images}", "--sigma", "-1"], "sigma"),
        (["eval", "{task}", "--weights", "{weights}", "--images", "{images}", "--converted", "x"], "lorun_config.json"),
        (["convert", "{task}", "--weights", "{images}/notes.txt", "--out", "x"], "cannot read tensors from"),
    ],
)
def test_mistakes_end_with_a_sentence(arguments, message, task_file, weights, images, capsys, monkeypatch) -> None:
    filled = [a.format(task=task_file, weights=weights, images=images) for a in arguments]
    code, out, err = call(capsys, monkeypatch, *filled)
    assert code == 2 and message in err and "Traceback" not in err and out == ""


def test_as_a_process(task_file, weights, tmp_path) -> None:
    code, out, err = run("inspect", task_file, "--weights", weights)
    assert code == 0 and "3 stages" in out and err == "looking for stages …\n"
    code, out, err = run("inspect", tmp_path / "nothing.py")
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("error: ")
    assert run("--help")[0] == 0 and run("nothing")[0] == 2


@pytest.mark.parametrize(
    "change, message",
    [
        ("measure = None", r"has no function measure\(\)"),
        ("def build(): return 3", "found int"),
        ("def build(): raise KeyError('phi')", r"failed with KeyError: 'phi'; see .*my_task.py, line \d+"),
        ("def measure(images, sigma=0.0): return images", "write `return"),
        ("def restore(output, images): return output['image'][..., :-1]", r"found \(1, 3, 16, 15\)"),
        ("def restore(output, images): return output['nothing']", "KeyError"),
        ("channels = 'grey'", "expected channels"),
        ("patch = 0", "expected patch"),
        ("import nothing_at_all", "ModuleNotFoundError"),
        ("def (", "SyntaxError"),
    ],
)
def test_mistakes_in_a_task(task_file: Path, change: str, message: str) -> None:
    task_file.write_text(COLOUR_TASK + change)
    with pytest.raises(LoRunError, match=message):
        task = load_task(str(task_file))
        net = task.build()
        image = torch.rand(1, 3, 16, 16)
        task.run(net, task.measure(image), image)


def test_a_task_module_of_the_current_folder(task_file: Path, monkeypatch, capsys) -> None:
    package = task_file.parent / "mine"
    package.mkdir()
    task_file.rename(package / "task.py")
    monkeypatch.chdir(task_file.parent)
    code, out, _ = call(capsys, monkeypatch, "inspect", "mine.task")
    assert code == 0 and "Colour: 3 stages" in out


def test_a_forward_that_differentiates(task_file: Path) -> None:
    step = """with torch.enable_grad():
            z = y.detach().requires_grad_()
            y = y - 0.1 * torch.autograd.grad(z.square().sum(), z)[0]
        flat = y.reshape"""
    task_file.write_text(COLOUR_TASK.replace("flat = y.reshape", step))
    task = load_task(str(task_file))
    image = torch.rand(1, 3, 16, 16)
    assert task.run(task.build(), task.measure(image), image).shape == image.shape


def test_a_task_that_adds_no_noise(task_file: Path) -> None:
    task_file.write_text(
        COLOUR_TASK
        + textwrap.dedent("""
        def measure(images, sigma=0.0):
            if sigma:
                raise ValueError("the camera is noiseless")
            return images, {}
    """)
    )
    task = load_task(str(task_file))
    assert len(task.measure(torch.rand(1, 3, 8, 8))) == 2
    with pytest.raises(LoRunError, match="the camera is noiseless"):
        task.measure(torch.rand(1, 3, 8, 8), 5)


def test_own_read_and_load(task_file: Path, tmp_path: Path) -> None:
    task_file.write_text(
        COLOUR_TASK
        + textwrap.dedent("""
        import numpy as np
        def read(path):
            return torch.from_numpy(np.load(path))
        def load(path, net):
            return {"net." + k: v for k, v in torch.load(path, weights_only=True)[1].items()}
    """)
    )
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data/x.npy", np.full((3, 16, 16), 0.25, np.float32))
    task = load_task(str(task_file))
    (file,) = task.images(tmp_path / "data")
    assert task.read(file).shape == (3, 16, 16)
    net = task.build()
    inner = {k.removeprefix("net."): torch.full_like(v, 0.5) for k, v in net.state_dict().items()}
    torch.save([None, inner], tmp_path / "odd.pt")
    task.load_weights(net, tmp_path / "odd.pt")
    assert all(bool((p == 0.5).all()) for p in net.parameters())


def test_images_as_they_come(task_file: Path, tmp_path: Path) -> None:
    task = load_task(str(task_file))
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    Image.fromarray(pixels).save(tmp_path / "grey.png")
    assert torch.equal(task.read(tmp_path / "grey.png"), torch.from_numpy(pixels).expand(3, 8, 8) / 255)
    task_file.write_text(COLOUR_TASK.replace("channels = 3", "channels = 1"))
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert torch.allclose(load_task(str(task_file)).read(tmp_path / "deep.png")[0], torch.from_numpy(pixels) / 255)
    (tmp_path / "bad.png").write_bytes(b"not an image")
    with pytest.raises(LoRunError, match="bad.png"):
        task.read(tmp_path / "bad.png")


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: {"params_ema": s},
        lambda s: {"model": {"state_dict": s}, "epoch": 1},
        lambda s: {"net": s},
        lambda s: {f"module.{k}": v for k, v in s.items()},
        lambda s: {f"_orig_mod.module.{k}": v for k, v in s.items()},
    ],
)
def test_state_dicts_as_they_come(tmp_path: Path, wrap) -> None:
    state = nn.Linear(2, 3).state_dict()
    torch.save(wrap(state), tmp_path / "net.pt")
    found = read_state_dict(tmp_path / "net.pt")
    assert set(found) == {"weight", "bias"} and torch.equal(found["weight"], state["weight"])


def test_what_is_no_state_dict(tmp_path: Path) -> None:
    save_file(nn.Linear(2, 3).state_dict(), tmp_path / "net.safetensors")
    assert set(read_state_dict(tmp_path / "net.safetensors")) == {"weight", "bias"}
    torch.save({"epoch": 3, "weights_a": {"x": torch.zeros(1)}}, tmp_path / "odd.pt")
    with pytest.raises(LoRunError, match=r"'epoch' \(int\), 'weights_a' \(dict\)"):
        read_state_dict(tmp_path / "odd.pt")
    torch.save(nn.Linear(2, 3), tmp_path / "module.pt")
    with pytest.raises(LoRunError, match="define load"):
        read_state_dict(tmp_path / "module.pt")
    (tmp_path / "bad.safetensors").write_bytes(b"\0" * 30)
    with pytest.raises(LoRunError, match="damage"):
        read_state_dict(tmp_path / "bad.safetensors")


def test_arguments_move_recursively() -> None:
    class Physics:
        def to(self, device):
            return ("moved", device)

    Pair = namedtuple("Pair", "a b")
    device = torch.device("meta")
    moved = to_device((Pair(torch.ones(1), 2), {"x": [torch.ones(1), Physics()]}, None, 3.5), device)
    assert moved[0].a.is_meta and moved[0].b == 2 and moved[1]["x"][0].is_meta
    assert moved[1]["x"][1] == ("moved", device) and moved[2:] == (None, 3.5)


def test_psnr_and_ssim() -> None:
    truth = torch.rand(1, 32, 32)
    assert psnr(truth, truth) == float("inf") and ssim(truth, truth) == pytest.approx(1)
    shifted = truth + 0.1
    assert psnr(shifted, truth) == pytest.approx(20, abs=1e-4)
    framed = truth.clone()
    framed[:, :3] = framed[:, -3:] = framed[..., :3] = framed[..., -3:] = 0
    assert psnr(framed, truth) < 20 and psnr(framed, truth, border=3) == float("inf")


def test_ways_are_compared_at_equal_bytes(tmp_path, images, capsys, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    import compare_methods

    # So wide that a file's header, which grows where a stage's bias is not to the bit the base's plus a
    # difference, is no matter.
    task_file, weights = tmp_path / "wide.py", tmp_path / "wide.safetensors"
    task_file.write_text(COLOUR_TASK.replace("Denoiser()", "Denoiser(32)"))
    save_file(load_task(str(task_file)).build().state_dict(), weights)
    given = [task_file, images, "--judge", images, "--weights", weights, "--minutes", "0.02", "--budgets", "0.6"]
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, given)])
    compare_methods.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    sizes = [int(row[1].replace(",", "")) for row in rows]
    assert len(rows) == 6 and "PEFT" in rows[-1][0]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.02) and max(sizes) <= 1.01 * sizes[0]
    assert all(abs(float(row[3])) < 1 for row in rows[:3])

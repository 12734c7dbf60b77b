"""Task files, checkpoints as they are found, and the command line."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tasks import COLOUR_TASK, call

from lorun_adapt import LoRunError
from lorun_adapt.task.metrics import psnr, ssim
from lorun_adapt.task.task import load_task


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
        ("weights = ['a.pth']", r"expected weights .* to be the path of a file, found \['a.pth'\]"),
        ("import nothing_at_all", r"needs nothing_at_all, .* line \d+: install the library that has it"),
        ("raise ModuleNotFoundError(name='deepinv')", r"needs deepinv, .*: run `pip install 'lorun-adapt\[deepinv\]'"),
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
    task = load_task(task_file)
    image = torch.rand(1, 3, 16, 16)
    assert task.run(task.build(), task.measure(image), image).shape == image.shape


def test_modules_of_a_task_may_have_parameters(task_file: Path) -> None:
    more = """
blur = nn.Conv2d(1, 1, 3, padding=1)

def through(images):
    return torch.cat([blur(image[:, None]) for image in images.unbind(1)], 1)

def measure(images, sigma=0.0):
    return through(images), {"mask": [through(images)[:, :1].expand(-1, 1, -1, -1)]}

def restore(output, images):
    return through(output["image"])
"""
    task_file.write_text(COLOUR_TASK + more)
    task, image = load_task(task_file), torch.rand(1, 3, 16, 16)
    y, extra = task.measure(image)
    assert not y.requires_grad and not extra["mask"][0].requires_grad
    assert task.run(task.build(), (y, extra), image).numpy().shape == image.shape


PARSES = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--stages", type=int, default=9)
"""


def test_two_tasks_with_modules_of_one_name(tmp_path: Path) -> None:
    text = "from model import Net\nfrom parts.layers import KIND\n"
    text += "def build(): return Net()\ndef measure(images, sigma=0.0): return (images,)\ndef restore(o, i): return o\n"
    for name in ("a", "b"):
        (tmp_path / name / "parts").mkdir(parents=True)
        (tmp_path / name / "task.py").write_text(text)
        (tmp_path / name / "parts/layers.py").write_text(f"KIND = {name!r}\n")
        (tmp_path / name / "model.py").write_text(
            f"from torch import nn\nclass Net(nn.Module):\n    which = {name!r}\n"
        )
    for name in ("a", "b", "a"):
        task = load_task(tmp_path / name / "task.py")
        assert task.build().which == task.module.KIND == name
    assert load_task(tmp_path / "a/task.py").module.Net is task.module.Net


def test_it_does_not_see_our_command_line(task_file: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lorun-adapt", "inspect", "--stages", "fcs.*"])
    parse = PARSES + "assert parser.parse_args().stages == 9\n"
    task_file.write_text(parse + COLOUR_TASK.replace("def build():", "def build():\n    parser.parse_args()"))
    load_task(task_file).build()
    assert sys.argv == ["lorun-adapt", "inspect", "--stages", "fcs.*"]


@pytest.mark.parametrize("where", ["module", "build", "measure"])
def test_it_does_not_end_our_process(task_file: Path, where: str, capsys) -> None:
    ends = "\nimport sys\n" + {
        "module": "sys.exit('no data')\n" + COLOUR_TASK,
        "build": COLOUR_TASK + PARSES + "parser.add_argument('--data', required=True)\nbuild = parser.parse_args\n",
        "measure": COLOUR_TASK + "\ndef measure(images, sigma=0.0):\n    sys.exit()\n",
    }.get(where)
    task_file.write_text(ends)
    with pytest.raises(LoRunError, match=r"my_task.py ends the process with sys.exit\(.*\), see .*line \d+: move what"):
        task = load_task(task_file)
        task.build()
        task.example_inputs()


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


def test_images_in_folders_within_are_pointed_out(task_file: Path, tmp_path: Path) -> None:
    task_file.write_text(COLOUR_TASK)
    task, images = load_task(task_file), tmp_path / "images"
    for name in (".thumbnails/a.png", "notes/b.txt", "train/c.JPG", "val/d.png"):
        (images / name).parent.mkdir(parents=True)
        (images / name).write_bytes(b"")
    with pytest.raises(LoRunError, match=r"no image files in .*images itself: give .*, such as .*images/train$"):
        task.images(images)
    assert [path.name for path in task.images(images / "train")] == ["c.JPG"]
    with pytest.raises(LoRunError, match=r"no image files in .*notes: give a folder with files such as"):
        task.images(images / "notes")


def test_images_of_many_channels_are_shown_as_the_task_says(task_file: Path) -> None:
    task_file.write_text(COLOUR_TASK)
    images = torch.rand(2, 5, 4, 6) * 1.5 - 0.2
    for shown in (images[:, :1], images[:, :3]):
        assert torch.equal(load_task(task_file).picture(shown), shown.clamp(0, 1))
    torch.testing.assert_close(load_task(task_file).picture(images), images.mean(1, keepdim=True).clamp(0, 1))
    task_file.write_text(COLOUR_TASK + "def picture(images): return images[:, [4, 2, 0]]")
    assert torch.equal(load_task(task_file).picture(images), images[:, [4, 2, 0]].clamp(0, 1))
    task_file.write_text(COLOUR_TASK + "def picture(images): return images[0]")
    with pytest.raises(LoRunError, match=r"expected picture\(\) of .* to return images of shape \(2, 3, 4, 6\)"):
        load_task(task_file).picture(images)


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


def test_psnr_and_ssim() -> None:
    truth = torch.rand(1, 32, 32)
    assert psnr(truth, truth) == float("inf") and ssim(truth, truth) == pytest.approx(1)
    shifted = truth + 0.1
    assert psnr(shifted, truth) == pytest.approx(20, abs=1e-4)
    framed = truth.clone()
    framed[:, :3] = framed[:, -3:] = framed[..., :3] = framed[..., -3:] = 0
    assert psnr(framed, truth) < 20 and psnr(framed, truth, border=3) == float("inf")

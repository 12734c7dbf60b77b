"""Restoring images into files, whole and in tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.io
import tifffile
import torch
from PIL import Image
from tasks import COLOUR_TASK, GREY_TASK, call

import lorun_adapt
from lorun_adapt import LoRunError
from lorun_adapt.task.images import read_image
from lorun_adapt.task.restore import restore, restore_files, restore_measurements
from lorun_adapt.task.task import load_task
from lorun_adapt.task.tiles import _spans
from lorun_adapt.util.modules import positional_arguments

SAME = "\n\ndef restore(output, images):\n    return images\n"  # returns what was measured


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder, generator = tmp_path / "in", np.random.default_rng(0)
    folder.mkdir()
    deep = generator.integers(0, 65536, (12, 17)).astype(np.uint16)
    colours = generator.integers(0, 65536, (11, 18, 3)).astype(np.uint16)
    Image.fromarray((deep >> 8).astype(np.uint8)).save(folder / "grey.png")
    Image.fromarray((colours >> 8).astype(np.uint8)).save(folder / "colour.jpg")
    Image.fromarray(deep).save(folder / "grey16.png")
    tifffile.imwrite(folder / "deep.tif", colours, photometric="rgb")
    tifffile.imwrite(folder / "float.tiff", (deep / 65535).astype(np.float32))
    return sorted(folder.iterdir())


@pytest.mark.parametrize("text, channels", [(GREY_TASK, 1), (COLOUR_TASK, 3)])
def test_names_and_depths_are_kept(tmp_path: Path, files: list[Path], text: str, channels: int) -> None:
    (tmp_path / "task.py").write_text(text + SAME)
    task = load_task(tmp_path / "task.py")
    written = restore_files(task, task.build(), files, tmp_path / "out")
    grey16 = "grey16.png" if channels == 1 else "grey16.tif"  # Pillow writes no PNG with colours of 16 bits
    assert [path.name for path in written] == ["colour.png", "deep.tif", "float.tiff", "grey.png", grey16]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in written}
    for path, original in zip(written, files):
        limit = 1e-6 + (0 if channels == 3 else 0.5 / (255 if path.suffix == ".png" else 65535))
        assert (read_image(path, channels) - task.read(original)).abs().max() < limit, path
    arrays = [np.asarray(Image.open(written[3])), *map(tifffile.imread, written[1:3])]
    assert [array.dtype for array in arrays] == [np.uint8, np.uint16, np.float32]


def test_no_image_is_written_where_the_network_diverged(tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "task.py").write_text(GREY_TASK + "\n\ndef restore(output, images):\n    return images / 0\n")
    task = load_task(tmp_path / "task.py")
    with pytest.raises(LoRunError, match=r"returned NaN or Inf for .*colour.jpg, so no image is written"):
        restore_files(task, task.build(), files, tmp_path / "out")
    text = "\n\ndef restore(output, images):\n    return output * float('nan')\n"
    (tmp_path / "task.py").write_text(GREY_TASK + text)
    task = load_task(tmp_path / "task.py")
    np.savez(tmp_path / "a.npz", y=np.ones((1, 1, 8, 8)), mask=np.ones((1, 1, 8, 8)))
    names = {"y": True, "mask": True}
    with pytest.raises(LoRunError, match=r"returned NaN or Inf for .*a.npz, so no image is written"):
        restore_measurements(task, task.build(), names, [tmp_path / "a.npz"], tmp_path / "out")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_nothing_is_overwritten_unasked(tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "task.py").write_text(GREY_TASK + SAME)
    task, out = load_task(tmp_path / "task.py"), tmp_path / "out"
    out.mkdir()
    (out / "grey.png").write_bytes(b"mine")
    with pytest.raises(LoRunError, match="grey.png is there already: give another folder, or pass --overwrite"):
        restore_files(task, task.build(), files, out)
    assert [path.name for path in out.iterdir()] == ["grey.png"] and (out / "grey.png").read_bytes() == b"mine"
    restore_files(task, task.build(), files, out, overwrite=True)
    assert (out / "grey.png").read_bytes() != b"mine" and len(list(out.iterdir())) == 5
    with pytest.raises(LoRunError, match="is an image to restore"):
        restore_files(task, task.build(), files, files[0].parent, overwrite=True)
    (files[0].parent / "grey.bmp").write_bytes(files[3].read_bytes())
    with pytest.raises(LoRunError, match="several images would be written to .*grey.png"):
        restore_files(task, task.build(), [*files, files[0].parent / "grey.bmp"], tmp_path / "more")
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("size", [(64, 64), (50, 91), (20, 70), (16, 16)])
def test_tiles_equal_the_whole_away_from_their_seams(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "task.py").write_text(COLOUR_TASK + "\ntile = 6\n")  # after which its mask repeats
    task = load_task(tmp_path / "task.py")
    net, images = task.build(), torch.rand(1, 3, *size)
    whole, tiled = restore(task, net, images), restore(task, net, images, tile=36, overlap=12)
    seams = torch.zeros(size, dtype=torch.bool)
    for axis, length in enumerate(size):
        spans = _spans(length, 36, 24, 6)
        for (_, end), (start, _) in zip(spans, spans[1:]):
            seams.narrow(axis, start, end - start).fill_(True)
    assert torch.allclose(tiled[..., ~seams], whole[..., ~seams], atol=1e-5)
    assert (tiled - whole).abs().max() < 0.3 and tiled.isfinite().all()


def test_tiles_start_at_blocks(tmp_path: Path) -> None:
    blocks = """
import torch
from torch import nn
tile, starts = 8, []

def build():
    return nn.Identity()

def measure(images, sigma=0.0):
    starts.append(images.shape[-2:])
    return (images.unfold(-2, 8, 8).mean(-1).repeat_interleave(8, -2)[..., : images.shape[-2], :],)

def restore(output, images):
    return output
"""
    (tmp_path / "task.py").write_text(blocks)
    task = load_task(tmp_path / "task.py")
    images = torch.rand(1, 1, 48, 40)
    tiled = restore(task, task.build(), images, tile=16, overlap=3)
    assert torch.allclose(tiled, task.measure(images)[0], atol=1e-5)  # the blocks of tiles are those of the image
    for tile, overlap in ((12, 0), (4, 0), (16, 9), (16, -1)):
        with pytest.raises(LoRunError, match="a multiple of 8 pixels|an overlap of 0 to 8 pixels for tiles of 16"):
            restore(task, task.build(), images, tile=tile, overlap=overlap)
    (tmp_path / "task.py").write_text(blocks.replace("tile, starts = 8, []", "starts = []"))
    task = load_task(tmp_path / "task.py")
    with pytest.raises(LoRunError, match="does not say that its network is local"):
        restore(task, task.build(), images, tile=16)


def test_restore_on_the_command_line(task_file, weights, images, tmp_path, capsys, monkeypatch) -> None:
    task_file.write_text(task_file.read_text() + "\ntile = 1\n")
    given = ("restore", task_file, "--images", images, "--out")
    code, out, _ = call(capsys, monkeypatch, *given, tmp_path / "plain", "--weights", weights)
    assert code == 0 and f"wrote 2 images to {tmp_path / 'plain'}" in out
    assert call(
        capsys, monkeypatch, "convert", task_file, "--weights", weights, "--rank", 1, "--out", tmp_path / "net"
    )[0] == 0  # fmt: skip
    code, _, err = call(capsys, monkeypatch, *given, tmp_path / "small", "--converted", tmp_path / "net", "--sigma", 5)
    assert code == 0, err
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert names == {"a.png", "b.png"} == {path.name for path in (tmp_path / "plain").iterdir()}
    code, _, err = call(capsys, monkeypatch, *given, tmp_path / "small", "--converted", tmp_path / "net")
    assert code == 2 and "is there already" in err
    tiles = (tmp_path / "tiles", "--converted", tmp_path / "net", "--tile", 16, "--overlap", 8)
    assert call(capsys, monkeypatch, *given, *tiles)[0] == 0
    for wrong, message in (
        (("--overlap", 8, "--weights", weights), "give --tile"),
        (("--converted", tmp_path / "net", "--weights", weights), "leave out either"),
        (("--adapter-name", "default", "--weights", weights), "give --converted"),
    ):
        code, _, err = call(capsys, monkeypatch, *given, tmp_path / "other", *wrong)
        assert code == 2 and message in err and not (tmp_path / "other").exists()


def test_cubes_are_written_as_arrays(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(
        "from torch import nn\nchannels = 5\nbuild = nn.Identity\n"
        "def measure(images, sigma=0.0):\n    return (images,)\ndef restore(output, images):\n    return output\n"
    )
    np.save(tmp_path / "cube.npy", np.random.default_rng(0).random((6, 8, 5)).astype(np.float32))
    task = load_task(tmp_path / "task.py")
    (written,) = restore_files(task, task.build(), [tmp_path / "cube.npy"], tmp_path / "out")
    assert written.name == "cube.npy" and np.array_equal(np.load(written), task.read(tmp_path / "cube.npy").numpy())
    with pytest.raises(LoRunError, match=r"expected images \(B, C, H, W\), found \(5, 6, 8\)"):
        restore(task, task.build(), task.read(tmp_path / "cube.npy"))
    assert restore(task, task.build(), torch.rand(1, 5, 6, 8).double()).dtype == torch.float32


def test_optional_arguments_are_taken_from_the_file(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text(GREY_TASK)
    task = load_task(tmp_path / "task.py")

    class Masked(torch.nn.Module):
        def forward(self, y, mask=None, gain=1.0):
            return y if mask is None else y * mask

    y, mask = torch.rand(1, 1, 8, 8), torch.zeros(1, 1, 8, 8)
    np.savez(tmp_path / "a.npz", y=y.numpy(), mask=mask.numpy())
    names = positional_arguments(torch.nn.DataParallel(Masked()))
    (written,) = restore_measurements(task, Masked(), names, [tmp_path / "a.npz"], tmp_path / "out")
    assert not np.asarray(Image.open(written)).any()
    np.savez(tmp_path / "a.npz", y=y.numpy(), msk=mask.numpy())
    with pytest.raises(LoRunError, match="takes y, mask, gain, and .*a.npz has y, msk: name the arrays like"):
        restore_measurements(task, Masked(), names, [tmp_path / "a.npz"], tmp_path / "more")


def test_from_measurements(tmp_path: Path, capsys, monkeypatch) -> None:
    text = GREY_TASK + "\nweights = 'net.pth'\n"
    (tmp_path / "task.py").write_text(text)
    task = load_task(tmp_path / "task.py")
    net, image = task.build(), torch.rand(1, 1, 12, 20)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    y, mask = task.measure(image)
    expected = task.run(net, (y, mask), image)[0].clamp(0, 1)
    folder = tmp_path / "measured"
    folder.mkdir()
    scipy.io.savemat(folder / "a.mat", {"y": y.numpy(), "mask": mask.numpy(), "note": "text"})
    np.savez(folder / "b.npz", mask=mask.numpy().astype(np.float64), y=y.numpy())
    given = ("restore", tmp_path / "task.py", "--out", tmp_path / "out", "--measurements")
    code, out, err = call(capsys, monkeypatch, *given, folder)
    assert code == 0 and "wrote 2 images" in out, err
    for name in ("a.png", "b.png"):
        assert (read_image(tmp_path / "out" / name, 1) - expected).abs().max() < 0.51 / 65535
    np.save(tmp_path / "y.npy", y.numpy())
    code, _, err = call(capsys, monkeypatch, *given, tmp_path / "y.npy")
    assert code == 2 and "forward takes y, mask, and" in err and "has y: name the arrays like the first" in err
    more = "\n\ndef arguments(arrays):\n    return arrays['y'], torch.ones(1, 1, *arrays['y'].shape[-2:])\n"
    (tmp_path / "task.py").write_text(text + more)
    code, out, err = call(capsys, monkeypatch, *given, tmp_path / "y.npy")
    assert code == 0 and "wrote 1 image to" in out, err
    assert (read_image(tmp_path / "out/y.png", 1) - expected).abs().max() < 0.51 / 65535
    (tmp_path / "task.py").write_text(text + "\n\ndef arguments(arrays):\n    return arrays['y']\n")
    code, _, err = call(capsys, monkeypatch, *given, tmp_path / "y.npy", "--overwrite")
    assert code == 2 and "expected arguments() of" in err and "write `return (y,)` for one" in err
    (tmp_path / "task.py").write_text(text + more + "\n\ndef restore(output, images):\n    return output[..., 0]\n")
    code, _, err = call(capsys, monkeypatch, *given, tmp_path / "y.npy", "--overwrite")
    assert code == 2 and "one image (1, 1, H, W), found (1, 1, 12): it gets None for the images" in err
    for wrong, message in (
        ((folder, "--images", folder), "give either --images or --measurements"),
        ((folder, "--tile", 16), "give --images"),
        ((folder, "--sigma", 5), "give --images"),
        ((tmp_path / "none",), "no measurements at"),
        ((tmp_path / "out",), "no measurements in"),
    ):
        code, _, err = call(capsys, monkeypatch, *given, *wrong)
        assert code == 2 and message in err


def test_restore_in_python(task_file, weights) -> None:
    task = load_task(task_file)
    net, images = task.build(), torch.rand(2, 3, 16, 20)
    task.load_weights(net, weights)
    lorun = lorun_adapt.convert(net, rank=1, example_inputs=task.example_inputs())
    lorun.task = task
    with torch.no_grad():
        expected = task.restored(lorun(*task.measure(images)), images)
    assert torch.equal(lorun.restore(images), expected)
    assert not torch.equal(lorun.restore(images, sigma=10), expected) and lorun.adapter_info["default"].sigma is None

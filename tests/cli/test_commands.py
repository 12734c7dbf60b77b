"""Commands on a task file: what they print and save, and the sentences that mistakes end with."""

from __future__ import annotations

import io
import json
import warnings

import numpy as np
import pytest
from PIL import Image
from tasks import call, run

from lorun_adapt.cli.main import main
from lorun_adapt.task.task import load_task


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
    given = ("eval", task_file, "--converted", tmp_path / "out", "--images", images)
    code, out, _ = call(capsys, monkeypatch, *given)
    assert code == 0 and "mean" in out and "a.JPG" in out
    code, out, _ = call(capsys, monkeypatch, *given, "--metric", "psnr_y", "--metric", "sam", "--record")
    assert code == 0 and "PSNR of Y" in out and "SAM (rad)" in out
    assert "sam of the original" in (tmp_path / "out/README.md").read_text()
    code, _, err = call(capsys, monkeypatch, *given, "--metric", "mse")
    assert code == 2 and err == "error: no metric 'mse': choose from psnr, ssim, psnr_y, sam, lpips\n"


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


def test_the_state_of_a_run_stays_until_its_result_is_saved(
    task_file, weights, images, tmp_path, capsys, monkeypatch
) -> None:
    state = tmp_path / "state.safetensors"
    arguments = (
        "convert", task_file, "--weights", weights, "--calibration", images, "--steps", 6, "--rank", 1,
        "--resume-from", state, "--out", tmp_path / "out",
    )  # fmt: skip

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full_disk:
        full_disk.setattr("lorun_adapt.model.lorun_model.save", full)
        with pytest.raises(OSError):
            call(capsys, monkeypatch, *arguments)
    assert state.exists() and not (tmp_path / "out").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code, _, err = call(capsys, monkeypatch, *arguments)
    assert code == 0 and "was over already" in err and (tmp_path / "out").exists() and not state.exists()


def test_json_is_alone_on_standard_output(task_file, weights, images, capsys, monkeypatch) -> None:
    task_file.write_text(task_file.read_text() + "\nprint('imported')\n")
    code, out, err = call(capsys, monkeypatch, "eval", task_file, "--weights", weights, "--images", images, "--json")
    assert code == 0 and json.loads(out)["images"] and "imported" in err


def test_names_of_images_are_shown_as_they_are(task_file, weights, images, monkeypatch) -> None:
    first = min(images.iterdir())
    first.rename(images / "Größe[left].png")
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.argv", ["", "eval", str(task_file), "--weights", str(weights), "--images", str(images)])
    with pytest.raises(SystemExit):
        main()
    out.flush()
    assert rb"Gr\xf6\xdfe[left].png" in out.buffer.getvalue()


def test_scores_without_end_are_null(task_file, weights, images, tmp_path, capsys, monkeypatch) -> None:
    black = tmp_path / "black"
    black.mkdir()
    Image.new("RGB", (20, 20)).save(black / "black.png")
    task_file.write_text(task_file.read_text() + "\ndef restore(output, images):\n    return images\n")
    code, out, _ = call(capsys, monkeypatch, "eval", task_file, "--weights", weights, "--images", black, "--json")
    assert code == 0 and "Infinity" not in out and json.loads(out)["mean"]["psnr"] is None


def test_mistakes_in_training_options(task_file, weights, images, tmp_path, capsys, monkeypatch) -> None:
    given = ("convert", task_file, "--weights", weights, "--out", tmp_path / "out")
    for arguments, message in (
        (("--minutes", 3), "--minutes need --calibration"),
        (("--steps", 3, "--resume-from", tmp_path / "state"), "--steps and --resume-from need --calibration"),
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
        (["inspect", "no.such.module"], "no task module no.such.module (No module named 'no'): check the name"),
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
        (["convert", "{task}", "--weights", "{images}/notes.txt", "--out", "x"], "is no file of torch or safetensors"),
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

"""Fine-tuning for another noise, and what other commands do with the sets, on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fine_tuning_runs import same
from PIL import Image
from safetensors.torch import load_file
from tasks import GREY_TASK, call, call_quietly

import lorun_adapt
from lorun_adapt.files.description import as_text
from lorun_adapt.files.layout import INTERPOLATED
from lorun_adapt.task.task import load_task
from lorun_adapt.training.trainer import Trainer


def test_names_of_files_stay_inside(made, capsys, monkeypatch) -> None:
    description = json.loads((made / "net/lorun_config.json").read_text())
    description.pop("sha256")
    description["files"]["../outside/x"] = "0" * 64
    (made / "net/lorun_config.json").write_text(as_text(description))
    code, _, err = call(
        capsys, monkeypatch, "eval", made / "my_task.py", "--converted", made / "net", "--images", made / "images",
        "--record",
    )  # fmt: skip
    assert code == 2 and "invalid 'files'" in err and not (made / "outside").exists()


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, eight images, and a conversion."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "my_task.py").write_text(GREY_TASK)
    task = load_task(str(folder / "my_task.py"))
    torch.save(task.build().state_dict(), folder / "net.pth")
    (folder / "images").mkdir()
    smooth = np.linspace(0, 200, 40)[:, None] + np.linspace(0, 50, 40)
    for i in range(8):
        Image.fromarray(np.roll(smooth, 5 * i, 0).astype(np.uint8)).save(folder / f"images/{i}.png")
    call_quietly(
        "convert", folder / "my_task.py", "--weights", folder / "net.pth", "--rank", 2,
        "--calibration", folder / "images", "--steps", 20, "--sigma", 0, "--out", folder / "net",
    )  # fmt: skip
    return folder


@pytest.fixture
def made(made_once: Path, tmp_path: Path) -> Path:
    """A copy of the same, to change."""
    return Path(shutil.copytree(made_once, tmp_path, dirs_exist_ok=True))


def finetune(made: Path, capsys, monkeypatch, *options: object) -> tuple[int, str, str]:
    arguments = ["--converted", made / "net", "--sigma", 25, "--adapter-name", "sigma25", "--images", made / "images"]
    return call(capsys, monkeypatch, "finetune", made / "my_task.py", *arguments, "--out", made / "out", *options)


def test_finetune_on_the_command_line(made, capsys, monkeypatch) -> None:
    """From eight images."""
    code, out, err = finetune(made, capsys, monkeypatch, "--steps", 150)
    assert code == 0, err
    scores = {line.split()[0]: float(line.split()[1]) for line in out.splitlines() if len(line.split()) == 3}
    assert scores["sigma25"] > scores["default"] + 0.3
    task = load_task(str(made / "my_task.py"))
    lorun = lorun_adapt.from_pretrained(made / "out", task.build())
    assert lorun.adapter_names == ["default", "sigma25"] and lorun.adapter_info["default"].sigma == 0
    about = lorun.adapter_info["sigma25"]
    assert about.sigma == 25 and about.quality[0].count == 1 and about.quality[0].images == "images, held out"
    before = lorun_adapt.from_pretrained(made / "net", task.build())
    for name, tensor in before.state_dict().items():
        assert torch.equal(lorun.state_dict()[name], tensor)
    assert lorun.active_adapters == ["default"]
    lorun.task = task
    assert lorun.network.sigmas == [0.0] * 3
    lorun.set_adapter("sigma25")
    assert lorun.network.sigmas == [25.0] * 3
    assert lorun.select_adapter("auto", torch.zeros(3, 3)) == "default"
    with pytest.warns(UserWarning, match="nearest"):
        assert lorun.select_adapter("auto", 200 * torch.randn(3, 3)) == "sigma25"
    assert lorun.select_adapter(12.5) == INTERPOLATED

    code, out, err = call(
        capsys, monkeypatch, "eval", made / "my_task.py", "--converted", made / "out", "--images", made / "images",
        "--adapter-name", "default", "--sigma", 25, "--record", "--json",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["parameters_converted"] == before.num_parameters()  # with the set that ran
    again = lorun_adapt.from_pretrained(made / "out", task.build())
    assert again.adapter_info["default"].quality[0].psnr == json.loads(out)["mean"]["psnr_converted"]
    assert again.active_adapters == lorun_adapt.from_pretrained(made / "out", task.build()).active_adapters
    assert again.adapter_names == ["default", "sigma25"] and again.adapter_info["sigma25"] == about


def test_sets_on_the_original_network(made, capsys, monkeypatch) -> None:
    task, given = made / "my_task.py", ("--weights", made / "net.pth")
    images = ("--images", made / "images")
    code, out, err = call(
        capsys, monkeypatch, "convert", task, *given, "--rank", 2, "--no-share", "--out", made / "unshared"
    )
    assert code == 0 and "base of all stages" in out and "warning" not in err, err
    code, out, err = call(
        capsys, monkeypatch, "finetune", task, "--converted", made / "unshared", "--sigma", 25, "--adapter-name",
        "sigma25", *images, "--steps", 150, "--out", made / "tuned",
    )  # fmt: skip
    assert code == 0, err
    scores = {line.split()[0]: float(line.split()[1]) for line in out.splitlines() if len(line.split()) == 3}
    assert scores["sigma25"] > scores["default"] + 0.3
    code, out, err = call(
        capsys, monkeypatch, "eval", task, *given, "--converted", made / "tuned", *images, "--adapter-name", "default",
        "--json",
    )  # fmt: skip
    mean = json.loads(out)["mean"]
    assert mean["psnr"] == mean["psnr_converted"]
    page = made / "page.html"
    code, _, err = call(capsys, monkeypatch, "report", made / "tuned", "--task", task, *given, *images, "--out", page)
    assert code == 0, err
    assert "adapters on the original" in page.read_text() and "not recovered" not in page.read_text()
    code, _, err = call(
        capsys, monkeypatch, "convert", task, *given, "--no-share", "--calibration", made / "images", "--steps", 1,
        "--out", made / "wrong",
    )  # fmt: skip
    assert code == 2 and "--no-share leaves nothing to recover" in err and not (made / "wrong").exists()
    code, _, err = call(
        capsys, monkeypatch, "recover", task, *given, "--converted", made / "tuned", "--calibration", made / "images",
        "--steps", 1, "--out", made / "wrong",
    )  # fmt: skip
    assert code == 2 and "error: " in err and not (made / "wrong").exists()


TOLD = """
class Net(ListOfBlocks):
    sigma = 0.0

    def forward(self, y, mask):
        return super().forward(y + self.sigma / 255, mask)

def build():
    torch.manual_seed(0)
    return Net([Block(Denoiser()) for _ in range(3)])

def schedule(net, sigmas):
    net.sigma = sigmas[0]
"""


def test_original_and_conversion_are_told_the_same(made, capsys, monkeypatch) -> None:
    file = made / "told.py"
    file.write_text(GREY_TASK + TOLD)
    task = load_task(str(file))
    given = (file, "--weights", made / "net.pth")
    images = ("--images", made / "images", "--json")

    def scores(folder: Path, *options: object) -> tuple[float, float]:
        code, out, err = call(capsys, monkeypatch, "eval", *given, "--converted", folder, *images, *options)
        assert code == 0, err
        mean = json.loads(out)["mean"]
        return mean["psnr"], mean["psnr_converted"]

    code, _, err = call(capsys, monkeypatch, "convert", *given, "--rank", 100, "--out", made / "exact")
    assert code == 0, err
    for sigma in (0, 25):
        original, exact = scores(made / "exact", "--sigma", sigma, "--record")
        assert original == pytest.approx(exact, abs=1e-3)
    about = lorun_adapt.from_pretrained(made / "exact", task.build()).adapter_info["default"]
    assert about.noise_schedule is None and {found.sigma for found in about.quality} == {0, 25}
    training = ("--calibration", made / "images", "--steps", 10)
    code, _, err = call(
        capsys, monkeypatch, "convert", *given, "--rank", 100, *training, "--sigma", 25, "--out", made / "25"
    )
    assert code == 0, err
    code, _, err = call(
        capsys, monkeypatch, "recover", *given, "--converted", made / "25", *training, "--out", made / "again"
    )
    assert code == 0, err
    assert lorun_adapt.from_pretrained(made / "again", task.build()).adapter_info["default"].sigma == 25
    original, again = scores(made / "again", "--sigma", 25)
    assert original == pytest.approx(again, abs=0.1)


def test_where_to_save_is_looked_at_before_the_work(made, capsys, monkeypatch) -> None:
    (made / "results").mkdir()
    (made / "results/thesis.tex").write_text("years of work")
    monkeypatch.setattr("lorun_adapt.training.trainer.Trainer.train", lambda *_: pytest.fail("it trains"))
    for out in (made / "results", made / "my_task.py"):
        code, _, err = finetune(made, capsys, monkeypatch, "--steps", 3, "--out", out)
        assert code == 2 and "expected a" in err and "choose another" in err


def test_a_set_for_another_camera_has_no_noise_level(made, capsys, monkeypatch) -> None:
    given = ("--converted", made / "net", "--adapter-name", "camera", "--images", made / "images", "--steps", 2)
    code, out, err = call(capsys, monkeypatch, "finetune", made / "my_task.py", *given, "--out", made / "out")
    assert code == 0 and "sigma 0" in out, err
    lorun = lorun_adapt.from_pretrained(made / "out", load_task(str(made / "my_task.py")).build())
    about = lorun.adapter_info["camera"]
    assert about.sigma is None and about.quality[0].sigma == 0 and lorun.select_adapter(0) == "default"


def test_sets_that_are_there_already_stay(made, capsys, monkeypatch) -> None:
    def names(folder: Path) -> list[str]:
        return lorun_adapt.from_pretrained(folder, load_task(str(made / "my_task.py")).build()).adapter_names

    for name in ("first", "second", "second"):
        assert finetune(made, capsys, monkeypatch, "--steps", 2, "--adapter-name", name)[0] == 0
    assert names(made / "out") == ["default", "second", "first"] and names(made / "net") == ["default"]
    first = {path.name: path.read_bytes() for path in (made / "out/adapters/first/stage_01").iterdir()}

    def train(self, *_):  # another command saves to the folder meanwhile
        monkeypatch.setattr(Trainer, "train", trained)
        assert finetune(made, capsys, monkeypatch, "--steps", 2, "--adapter-name", "third")[0] == 0
        return trained(self, *_)

    trained = Trainer.train
    monkeypatch.setattr(Trainer, "train", train)
    assert finetune(made, capsys, monkeypatch, "--steps", 2, "--adapter-name", "fourth")[0] == 0
    assert set(names(made / "out")) == {"default", "first", "second", "third", "fourth"}
    assert first == {path.name: path.read_bytes() for path in (made / "out/adapters/first/stage_01").iterdir()}

    monkeypatch.setattr(Trainer, "train", lambda *_: pytest.fail("it trains"))
    given = (made / "my_task.py", "--weights", made / "net.pth", "--calibration", made / "images", "--steps", 3)
    for command in (("convert", *given, "--rank", 3), ("recover", *given, "--converted", made / "net")):
        code, _, err = call(capsys, monkeypatch, *command, "--out", made / "out")
        assert code == 2 and "has the adapter sets " in err and "first" in err and "choose another folder" in err
    other = (made / "my_task.py", "--weights", made / "net.pth", "--rank", 3, "--out", made / "other")
    assert call(capsys, monkeypatch, "convert", *other)[0] == 0
    code, _, err = finetune(made, capsys, monkeypatch, "--steps", 2, "--converted", made / "other")
    assert code == 2 and "which do not fit the network" in err
    (made / "out/lorun_config.json").write_text("{}")
    monkeypatch.setattr(Trainer, "train", trained)
    assert finetune(made, capsys, monkeypatch, "--steps", 2)[0] == 0
    assert first == {path.name: path.read_bytes() for path in (made / "out/adapters/first/stage_01").iterdir()}


def test_what_was_judged_is_shown_even_where_it_cannot_be_noted(made, capsys, monkeypatch) -> None:
    lorun = lorun_adapt.from_pretrained(made / "net", load_task(str(made / "my_task.py")).build())
    lorun.copy_adapter("default", "other")
    lorun.set_adapter({0: "other"})
    lorun.save_pretrained(made / "net")
    code, out, err = call(
        capsys, monkeypatch, "eval", made / "my_task.py", "--converted", made / "net", "--images", made / "images",
        "--record",
    )  # fmt: skip
    assert code == 2 and "mean" in out and "error: the stages run different sets" in err


def test_a_licence_that_no_card_can_hold(made, capsys, monkeypatch) -> None:
    file = made / "my_task.py"
    file.write_text(file.read_text() + "\nlicense = 'mit\\nmore'\n")
    code, _, err = finetune(made, capsys, monkeypatch, "--steps", 3)
    assert code == 2 and "expected license in" in err


def test_a_folder_keeps_its_dtype(made, capsys, monkeypatch) -> None:
    before = lorun_adapt.from_pretrained(made / "net", load_task(str(made / "my_task.py")).build())
    for dtype in (torch.float32, torch.float16):
        before.save_pretrained(made / "net", dtype=dtype)
        assert finetune(made, capsys, monkeypatch, "--steps", 3)[0] == 0
        assert stored(made / "out") == {dtype} and stored(made / "out/adapters/sigma25") == {dtype}
        for file in (made / "net").rglob("*.safetensors"):
            assert same(load_file(file), load_file(made / "out" / file.relative_to(made / "net")))
    assert finetune(made, capsys, monkeypatch, "--steps", 3, "--dtype", "float32")[0] == 0
    assert stored(made / "out") == {torch.float32}
    given = (made / "my_task.py", "--weights", made / "net.pth", "--converted", made / "net")
    given = (*given, "--calibration", made / "images", "--steps", 3, "--out", made / "again")
    assert call(capsys, monkeypatch, "recover", *given)[0] == 0 and stored(made / "again") == {torch.float16}
    before.save_pretrained(made / "net", dtype=torch.int8)
    assert finetune(made, capsys, monkeypatch, "--steps", 3)[0] == 0 and torch.int8 in stored(made / "out")
    for file in (made / "net").rglob("*.safetensors"):
        assert same(load_file(file), load_file(made / "out" / file.relative_to(made / "net")))


def stored(folder: Path) -> set[torch.dtype]:
    return {tensor.dtype for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()}


def test_cards(made, capsys, monkeypatch) -> None:
    from huggingface_hub import ModelCard

    assert finetune(made, capsys, monkeypatch, "--steps", 3)[0] == 0
    card = ModelCard.load(made / "out/README.md")
    assert (card.data.library_name, card.data.license, card.data.base_model) == ("lorun-adapt", "mit", "alice/original")
    assert card.data.eval_results[0].metric_type == "psnr" and "lora" in card.data.tags
    for words in ("Grey images behind a mask.", "| `sigma25` | 25 | 3 |", "from_pretrained", "images, held out"):
        assert words in card.text
    own = ModelCard.load(made / "out/adapters/sigma25/README.md")
    assert own.data.license == "mit" and "# sigma25: adapters for ListOfBlocks" in own.text
    first = ModelCard.load(made / "out/adapters/default/README.md")
    assert first.data.eval_results is None and "255: 0." in first.text
    lorun = lorun_adapt.from_pretrained(made / "out", load_task(str(made / "my_task.py")).build())
    lorun.save_pretrained(made / "alone", adapters_only=True)
    text = (made / "alone/README.md").read_text()
    assert "This folder has no base" in text and "load_adapter" in text


def test_images_that_cannot_be_judged_do_not_cost_the_training(made, capsys, monkeypatch) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(made / "images/0.png")  # the one that is held out
    code, _, err = finetune(made, capsys, monkeypatch, "--steps", 3)
    assert code == 2 and "11 pixels a side" in err
    assert "sigma25" in lorun_adapt.from_pretrained(made / "out", load_task(str(made / "my_task.py")).build()).adapters


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--steps", 3, "--start-from", "default", "--start-from", "default"), "start_from lists a set twice"),
        (("--steps", 3, "--adapter-name", "default"), "the set 'default' already exists"),
        (("--steps", 3, "--start-from", "nothing"), "no adapter set 'nothing'"),
        (("--steps", 3, "--also", "steps"), "outside the stages"),
        (("--steps", 3, "--minutes", 1), "both minutes and steps"),
        ((), "neither minutes nor steps"),
    ],
)
def test_mistakes_on_the_command_line(made, capsys, monkeypatch, options, message: str) -> None:
    code, _, err = finetune(made, capsys, monkeypatch, *options)
    assert code == 2 and message in err and not (made / "out").exists()


def test_one_image_is_too_few(made, capsys, monkeypatch) -> None:
    for i in range(1, 8):
        (made / f"images/{i}.png").unlink()
    code, _, err = finetune(made, capsys, monkeypatch, "--steps", 3)
    assert code == 2 and "2 or more images" in err

"""What the documents say is there: links, commands and their options, names, and the task file."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from skimage.io import imsave

import lorun_adapt
from lorun_adapt.cli.main import cli

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.cfg").exists())
DOCUMENTS = [
    ROOT / name for name in ("README.md", "lorun_adapt/README.md", "examples/README.md", "adapters/README.md")
] + sorted((ROOT / "lorun_adapt/guides").glob("*.md"))
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=IDS)


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", document.read_text(), re.MULTILINE | re.DOTALL)


def headings(document: Path) -> set[str]:
    """The anchors that GitHub gives the headings."""
    prose = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(document: Path) -> Iterator[list[str]]:
    """The arguments of each lorun-adapt in a bash block."""
    for block in blocks(document, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            tokens = shlex.shlex(line, posix=True, punctuation_chars=True)
            tokens.whitespace_split = True
            for separator, words in itertools.groupby(tokens, lambda token: token in ("&&", "|", ";")):
                name, *arguments = words
                if not separator and name.rpartition("/")[2] == "lorun-adapt":
                    yield arguments


def test_the_guides_are_there() -> None:
    guides = {path.name for path in DOCUMENTS if path.parent.name == "guides"}
    assert guides == {
        "your_network.md",
        "recovery.md",
        "noise_levels.md",
        "speed.md",
        "peft.md",
        "deepinv.md",
        "files.md",
    }


def test_readme_is_one_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert text.count("<!-- test command -->") == 1


@each_document
def test_links(document: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not re.match(r"https?://", link)]
    for link in links:
        name, _, anchor = link.partition("#")
        target = (document.parent / name).resolve() if name else document
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link}: outside the repository"
        assert not anchor or anchor in headings(target), f"{link}: no such heading"


def test_paths() -> None:
    """Files and folders that the contributors' page names in inline code."""
    document = ROOT / "lorun_adapt/README.md"
    prose = re.sub(r"^```.*?^```$|^## Changelog.*", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for name in re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?|[a-z_]+\.py)`", prose):
        assert (document.parent / name).exists() or (ROOT / name).exists(), f"{name}: no such file"


def test_every_folder_is_in_the_table() -> None:
    package = ROOT / "lorun_adapt"
    table = (package / "README.md").read_text().split("## Folders")[1].split("\n## ")[0]
    for folder in package.iterdir():
        if (folder / "__init__.py").exists() and (folder / "__init__.py").is_file() and folder.name != "examples":
            assert f"`{folder.name}/`" in table


@each_document
def test_commands_and_options(document: Path) -> None:
    for name, *arguments in commands(document):
        assert name in cli.commands, f"no command {name}"
        known = {
            option
            for parameter in cli.commands[name].params
            if isinstance(parameter, click.Option)
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        used = [argument.partition("=")[0] for argument in arguments if argument.startswith("--")]
        assert set(used) <= known, f"{name} has no {set(used) - known}"


def test_options_named_in_the_text() -> None:
    known = {option for command in cli.commands.values() for parameter in command.params for option in parameter.opts}
    known |= {"--mixed_precision", "--help", "--config", "--version"}  # accelerate's, click's, ruff's
    for document in DOCUMENTS:
        prose = re.sub(r"^```.*?^```$|^## Changelog.*", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        for code in re.findall(r"`(--[^`]*|lorun-adapt [^`]*)`", prose):
            assert set(re.findall(r"--[a-z_-]+", code)) <= known, f"{document}: {code}"


@each_document
def test_names_in_python(document: Path) -> None:
    """``lorun_adapt.x`` and ``from lorun_adapt import x`` exist, and so do attributes of a LoRunModel."""
    net = torch.nn.ModuleDict({"stages": torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(9, 9)) for _ in "ab")})
    lorun = lorun_adapt.convert(net, rank=1)
    for block in blocks(document, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module == "lorun_adapt":
                assert all(hasattr(lorun_adapt, alias.name) for alias in node.names)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = {"lorun_adapt": lorun_adapt, "lorun": lorun}.get(node.value.id)
                assert owner is None or hasattr(owner, node.attr), f"no {node.value.id}.{node.attr}"


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The task file of the guide, in the current folder."""
    text = (ROOT / "lorun_adapt/guides/your_network.md").read_text()
    (file,) = re.findall(r"<!-- task file -->\n```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "toy.py").write_text(file)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "toy.py"


def test_the_task_file_of_the_guide(toy: Path) -> None:
    task = lorun_adapt.load_task("toy.py")
    net = task.build()
    assert len(lorun_adapt.find_stages(net)) == 4
    lorun = lorun_adapt.convert(net, rank=4)
    images = torch.rand(2, 1, 48, 40)
    restored = task.run(lorun, task.measure(images, sigma=5), images)
    assert restored.shape == images.shape
    assert lorun.report().network_after.num_parameters < lorun.report().network_before.num_parameters
    lorun.recover(net, [task.measure(images)], steps=2)


def test_the_python_of_the_guide(toy: Path) -> None:
    torch.save(lorun_adapt.load_task("toy.py").build().state_dict(), "toy.pth")
    (block,) = [text for text in blocks(ROOT / "lorun_adapt/guides/your_network.md", "python") if "toy.py" in text]
    result: dict[str, object] = {}
    exec(block, result)
    assert isinstance(result["restored"], torch.Tensor)


def test_the_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "examples").mkdir()
    for name in ("compressive_sensing.py", "compressive_sensing.safetensors"):
        shutil.copy(ROOT / "examples" / name, tmp_path / "examples")
    (tmp_path / "photos").mkdir()
    photograph = (torch.rand(33, 33) * 255).byte().numpy()  # small, as are the batches, so that a step is quick
    imsave(tmp_path / "photos/camera.png", photograph, check_contrast=False)
    monkeypatch.setattr("lorun_adapt.task.crops.BATCH_PIXELS", 33 * 33)
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "README.md", "python")
    assert "minutes=6" in block
    result: dict[str, Any] = {}
    exec(block.replace("minutes=6", "steps=1"), result)
    assert result["restored"].shape == (1, 1, 33, 33)
    assert type(result["plain"]) is type(result["dun"])

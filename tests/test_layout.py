"""How the code is laid out: which folders may import which, and what each folder and each exported function says."""

from __future__ import annotations

import ast
import configparser
import graphlib
import inspect
import re
from pathlib import Path

import pytest

import lorun_adapt

ROOT = Path(lorun_adapt.__file__).parent
REPOSITORY = Path(__file__).parent.parent
FOLDERS = sorted(path.parent for path in ROOT.glob("*/__init__.py"))
MODULES = sorted(ROOT.rglob("*.py"))

# From the bottom up: a folder, or a module of the root, imports itself and what is on lower floors.
FLOORS = (
    {"errors", "_version"},
    {"util"},
    {"stages", "disk"},
    {"terms"},
    {"network"},
    {"peft_format"},
    {"factorise", "files"},
    {"training", "hub"},
    {"task"},
    {"model"},
    {"conversion"},
    {"bench", "export"},
    {"cli"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
FACE = {"__init__.py", "__main__.py"}  # they import what they offer


def place(module: str) -> str:
    """The folder or root module that ``lorun_adapt.x.y`` belongs to; of ``lorun_adapt`` itself, no more."""
    return module.split(".")[1] if "." in module else module


def imports(file: Path) -> list[str]:
    """The modules of this package that a file imports anywhere: in functions and under TYPE_CHECKING as well."""
    package = ["lorun_adapt", *file.relative_to(ROOT).parent.parts]
    found: list[str] = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            found += [f"{module}.{alias.name}" for alias in node.names] if module == "lorun_adapt" else [module]
    return [name for name in found if name.split(".")[0] == "lorun_adapt"]


@pytest.mark.parametrize("file", [str(f.relative_to(ROOT)) for f in MODULES if str(f.relative_to(ROOT)) not in FACE])
def test_nothing_imports_upwards(file: str) -> None:
    here = Path(file).parts[0].removesuffix(".py")
    wrong = [
        module
        for module in imports(ROOT / file)
        if place(module) != here and not FLOOR.get(place(module), len(FLOORS)) < FLOOR[here]
    ]
    assert wrong == []


def test_no_file_imports_itself_through_others() -> None:
    names = {f"lorun_adapt.{'.'.join(file.relative_to(ROOT).with_suffix('').parts)}": file for file in MODULES}
    graph = {name: {other for other in imports(file) if other in names} for name, file in names.items()}
    assert sum(map(len, graph.values())) > 300  # it sees what is imported
    graphlib.TopologicalSorter(graph).prepare()  # raises graphlib.CycleError


def test_what_stands_at_the_root() -> None:
    expected = {"__init__.py", "__main__.py", "_version.py", "py.typed", "errors.py", "conversion.py", "README.md"}
    assert {path.name for path in ROOT.iterdir() if path.is_file()} == expected
    assert {folder.name for folder in FOLDERS} | {"errors", "_version", "conversion"} == set(FLOOR)


@pytest.mark.parametrize("folder", [folder.name for folder in FOLDERS])
def test_a_folder_says_what_it_is_for(folder: str) -> None:
    said = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text())) or ""
    assert len(said.split()) >= 4


def test_packages_are_listed() -> None:
    config = configparser.ConfigParser()
    config.read(REPOSITORY / "setup.cfg")
    listed = set(config["options"]["packages"].split())
    folders = {f"lorun_adapt.{folder.name}" for folder in FOLDERS}
    assert listed == folders | {"lorun_adapt", "lorun_adapt.examples", "lorun_adapt.adapters"}


@pytest.mark.parametrize("name", sorted(lorun_adapt.__all__))
def test_exported_functions_have_an_example(name: str) -> None:
    value = getattr(lorun_adapt, name)
    assert not inspect.isfunction(value) or ">>> " in (inspect.getdoc(value) or "")


def test_one_kind_of_term_is_named_in_few_places() -> None:
    """What is done with adapters is done through the interface of a term."""
    named = [
        file.relative_to(ROOT).as_posix()
        for file in MODULES
        if re.search(r"\bLowRank\b|lora_A|lowrank_terms", file.read_text())
    ]
    others = [file for file in named if file not in ("terms/lowrank.py", "terms/registry.py")]
    assert len(others) <= 1 and all(file.startswith("peft_format/") for file in others), others


def test_tests_mirror_the_package_and_do_not_import_each_other() -> None:
    tests = REPOSITORY / "tests"
    folders = {path.name for path in tests.iterdir() if any(path.glob("*.py"))}
    assert folders - {"support", "examples"} <= {folder.name for folder in FOLDERS}
    # in scripts that they launch too
    pattern = re.compile(r"^\s*(?:from|import) (?:test_\w+|conftest)\b", re.MULTILINE)
    assert [str(file) for file in tests.rglob("*.py") if pattern.search(file.read_text())] == []

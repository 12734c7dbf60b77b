"""Running code that is not ours: a task file, and the network that it builds."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from ..errors import LoRunError

FOLDERS: set[Path] = set()  # of the task files that this process has loaded


@contextmanager
def own_command_line(name: str) -> Iterator[None]:
    """Run the user's code as if it had been started without arguments, and do not let it end the process.

    Published networks often parse the command line when they are imported or built.
    """
    before, sys.argv = sys.argv, [name]
    try:
        yield
    except SystemExit as error:
        raise LoRunError(
            f"{name} ends the process with sys.exit({error.code!r}), see {line_of(error)}: move what parses the "
            'command line under `if __name__ == "__main__":`, or give its options defaults'
        ) from error
    finally:
        sys.argv = before


def module_by_name(name: str) -> ModuleType:
    """Import a module, of the current folder as well."""
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does, and a console script does not
    return importlib.import_module(name)


def module_of_file(path: Path) -> ModuleType:
    """Import a Python file as a module of its own, with its folder on the search path.

    Raises:
        LoRunError: there is no such file.
    """
    if not path.is_file():
        raise LoRunError(f"no task file at {path}: give an existing .py file")
    name = f"lorun_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = path.resolve().parent
    _forget_namesakes(folder)
    FOLDERS.add(folder)
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))  # as for a script, so that it finds the network's code in its folder
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _forget_namesakes(folder: Path) -> None:
    """Forget modules of other tasks' folders that are named as one in this folder, such as ``model.py``."""
    for name in {path.name.removesuffix(".py") for path in folder.iterdir()} & sys.modules.keys():
        attributes = vars(sys.modules[name])
        places = list(attributes.get("__path__") or [attributes.get("__file__") or "/"])
        if any(Path(place).resolve().parent in FOLDERS - {folder} for place in places):
            for known in list(sys.modules):
                if known == name or known.startswith(f"{name}."):
                    del sys.modules[known]


def how_to_install(library: str) -> str:
    """What to do about a library that a task imports and that is missing; some are extras of this package."""
    try:
        extras = importlib.metadata.metadata("lorun-adapt").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:  # the package runs from where it lies
        extras = []
    return f"run `pip install 'lorun-adapt[{library}]'`" if library in extras else "install the library that has it"


def line_of(error: BaseException) -> str:
    """The innermost line of the traceback that is in no installed package and not in this one: the user's, often."""
    frames = traceback.extract_tb(error.__traceback__)
    chosen = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith("<")] or frames
    package = str(Path(__file__).parents[1])
    chosen = [f for f in chosen if not f.filename.startswith(package)] or chosen
    return f"{chosen[-1].filename}, line {chosen[-1].lineno}"

"""Task files: what ties a network to images.

A task file is a Python file (or ``package.module``) with

    def build() -> nn.Module: ...               # the network, untrained
    def measure(images, sigma=0.0): ...         # (B, C, H, W) in [0, 1] -> the arguments of the network's forward
    def restore(output, images): ...            # what the forward returned -> images, same shape

and, where the defaults don't fit, ``channels``, ``patch``, ``border``, ``weights``, ``read`` and
``load``; for sets of adapters for several noise levels ``schedule`` and ``noise_level``; and for
the card of what is shared ``license`` and ``base_model``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import LoRunError
from ..util.text import is_short

IMAGES = {".png", ".bmp", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
STATE_KEYS = ("state_dict", "model", "net", "params", "params_ema")
PREFIXES = ("module.", "_orig_mod.")  # left by nn.DataParallel and torch.compile


@dataclass(frozen=True)
class Task:
    """A task file, read and checked.

    Attributes:
        channels: image channels.
        patch: side of the crops for training, and of the image that ``inspect`` runs on.
        border: pixels at each side that the metrics leave out.
        weights: the checkpoint used where none is given.
        license, base_model: for the card of what is shared: how it is licensed, and a repository of the Hub that
            holds the original network.
    """

    name: str
    module: ModuleType
    channels: int = 1
    patch: int = 96
    border: int = 0
    weights: Path | None = None
    license: str | None = None
    base_model: str | None = None

    @property
    def title(self) -> str:
        """What the task is, in one line: the first of the file's docstring."""
        lines = (self.module.__doc__ or "").strip().splitlines()
        return lines[0].strip() if lines else self.name

    @property
    def schedule(self) -> Callable[[nn.Module, Sequence[float]], None] | None:
        """Hands a network the noise of each of its stages, on a scale of 0 to 255; None where the task has no such."""
        return self._optional("schedule")

    @property
    def noise_level(self) -> Callable[[tuple[Any, ...]], float] | None:
        """Estimates sigma, on a scale of 0 to 255, from the arguments of a forward; None where the task can't."""
        return self._optional("noise_level")

    def _optional(self, function: str) -> Callable[..., Any] | None:
        return functools.partial(self._call, function) if callable(getattr(self.module, function, None)) else None

    def build(self) -> nn.Module:
        net = self._call("build")
        if not isinstance(net, nn.Module):
            raise LoRunError(
                f"expected build() of {self.name} to return an nn.Module, found {type(net).__name__}: return it"
            )
        return net.eval()

    def measure(self, images: Tensor, sigma: float = 0.0) -> tuple[Any, ...]:
        """The arguments of the network's forward for ``images`` (B, C, H, W) in [0, 1]."""
        arguments = self._call("measure", images, sigma=sigma) if sigma else self._call("measure", images)
        if not isinstance(arguments, (tuple, list)):
            raise LoRunError(
                f"expected measure() of {self.name} to return a tuple of arguments, found {type(arguments).__name__}: "
                "write `return (y,)` for one"
            )
        return tuple(arguments)

    def run(self, net: nn.Module, arguments: tuple[Any, ...], images: Tensor) -> Tensor:
        """Restored images, shape of ``images``, on the CPU."""
        with torch.no_grad():  # not inference_mode: some forwards differentiate within themselves
            output = self._guard("the network's forward", net, *arguments)
        return self.restored(output, images).float().cpu()

    def restored(self, output: Any, images: Tensor) -> Tensor:
        """The images, of the shape of ``images``, in what the network's forward returned."""
        restored = self._call("restore", output, images)
        if not isinstance(restored, Tensor) or restored.shape != images.shape:
            found = tuple(restored.shape) if isinstance(restored, Tensor) else type(restored).__name__
            raise LoRunError(
                f"expected restore() of {self.name} to return images of shape {tuple(images.shape)}, found "
                f"{found}: cut off what measure() added"
            )
        return restored

    def example_inputs(self) -> tuple[Any, ...]:
        """The arguments for one image of noise."""
        generator = torch.Generator().manual_seed(0)
        return self.measure(torch.rand(1, self.channels, self.patch, self.patch, generator=generator))

    def images(self, folder: Path) -> list[Path]:
        """The image files of ``folder``, sorted by name."""
        if not folder.is_dir():
            raise LoRunError(f"expected a folder of images, found none at {folder}: give an existing folder")
        own = hasattr(self.module, "read")
        files = sorted(
            p
            for p in folder.iterdir()
            if p.is_file() and not p.name.startswith(".") and (own or p.suffix.lower() in IMAGES)
        )
        if not files:
            raise LoRunError(f"expected images in {folder}, found none: give a folder with files such as .png")
        return files

    def read(self, path: Path) -> Tensor:
        """An image of shape (C, H, W) in [0, 1]."""
        if hasattr(self.module, "read"):
            image = self._call("read", path)
            if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != self.channels:
                found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise LoRunError(
                    f"expected read() of {self.name} to return a tensor ({self.channels}, H, W), found {found} "
                    f"for {path}: mind channels"
                )
            return image.float()
        if self.channels not in (1, 3):
            raise LoRunError(
                f"expected 1 or 3 channels in {self.name}, found {self.channels}: define read(path) for others"
            )
        try:
            with Image.open(path) as image:
                return image_tensor(image, self.channels)
        except (UnidentifiedImageError, OSError) as error:
            raise LoRunError(
                f"expected an image, found {error} in {path}: remove the file or define read(path)"
            ) from error

    def load_weights(self, net: nn.Module, path: Path | None) -> None:
        """Load a checkpoint, or the task's own weights, into ``net``."""
        path = path or self.weights
        if path is None:
            raise LoRunError(
                f"expected weights for {self.name}, found none: give --weights, or set weights in the task"
            )
        if not path.is_file():
            raise LoRunError(f"expected a checkpoint, found no file at {path}: give an existing file")
        own = hasattr(self.module, "load")
        state = self._call("load", path, net) if own else read_state_dict(path)
        try:
            net.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            detail = " ".join(str(error).split())
            raise LoRunError(
                f"expected the weights of {type(net).__name__}, found others in {path}: {detail[:600]}; build the "
                f"network they are for{'' if own else ', or define load(path, net) in the task'}"
            ) from error

    def _call(self, function: str, *args: Any, **kwargs: Any) -> Any:
        return self._guard(f"{function}() of {self.name}", getattr(self.module, function), *args, **kwargs)

    def _guard(self, what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except LoRunError:
            raise
        except Exception as error:
            raise LoRunError(
                f"expected {what} to run, found {type(error).__name__}: {error} ({_where(error)})"
            ) from error


def load_task(name: str) -> Task:
    """Read a task file, or import a task module.

    Raises:
        LoRunError: no such file or module, an error in it, or a function that is missing.
    """
    try:
        module = _module_of_file(Path(name)) if name.endswith(".py") else _module_by_name(name)
    except LoRunError:
        raise
    except Exception as error:
        raise LoRunError(
            f"expected a task file or module, found {type(error).__name__} in {name}: {error} ({_where(error)})"
        ) from error
    for function in ("build", "measure", "restore"):
        if not callable(getattr(module, function, None)):
            raise LoRunError(
                f"expected a function {function}() in {name}, found none: a task file needs build, measure and restore"
            )
    options: dict[str, Any] = {}
    for option, least in (("channels", 1), ("patch", 1), ("border", 0)):
        value = getattr(module, option, None)
        if value is not None:
            if not isinstance(value, int) or value < least:
                raise LoRunError(
                    f"expected {option} in {name} to be a whole number from {least}, found {value!r}: change it"
                )
            options[option] = value
    for option in ("license", "base_model"):
        value = getattr(module, option, None)
        if value is not None:
            if not is_short(value):
                raise LoRunError(f"expected {option} in {name} to be a name, found {str(value)[:300]!r}: change it")
            options[option] = value
    weights = getattr(module, "weights", None)
    if weights is not None:
        options["weights"] = Path(module.__file__ or ".").parent / weights
    return Task(name, module, **options)


def _module_by_name(name: str) -> ModuleType:
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as `python -m` does; a console script does not
    return importlib.import_module(name)


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise LoRunError(f"expected a task file, found none at {path}: give an existing .py file")
    name = f"lorun_task_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # as for a script, so that it finds the network's code beside it
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _where(error: BaseException) -> str:
    """The innermost line that is not in an installed package: the user's, most often."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename and not f.filename.startswith("<")] or frames
    here = str(Path(__file__).parents[1])
    own = [f for f in own if not f.filename.startswith(here)] or own
    return f"{own[-1].filename}, line {own[-1].lineno}"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The state_dict in a safetensors or torch file, without the prefixes of wrappers."""
    if path.suffix == ".safetensors":
        try:
            return _without_prefix(load_file(path))
        except SafetensorError as error:
            raise LoRunError(
                f"expected a safetensors file, found damage in {path}: {error}; download it again"
            ) from error
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, pickle.UnpicklingError among them
        raise LoRunError(
            f"expected a file of tensors alone, found {type(error).__name__} in {path}: {str(error).splitlines()[0]}; "
            "if it holds other objects, save its state_dict by itself, or define load(path, net) in the task"
        ) from error
    found = _state_dict_in(held, 2)
    if found is None:
        raise LoRunError(
            f"expected a state_dict in {path}, found {_contents(held)}: define load(path, net) in the task"
        )
    return _without_prefix(found)


def _state_dict_in(held: object, depth: int) -> Mapping[str, Tensor] | None:
    if not isinstance(held, Mapping):
        return None
    if held and all(isinstance(value, Tensor) for value in held.values()):
        return held
    found = (_state_dict_in(held[key], depth - 1) for key in STATE_KEYS if key in held and depth)
    return next((state for state in found if state is not None), None)


def _contents(held: object) -> str:
    if not isinstance(held, Mapping):
        return type(held).__name__
    return "a dict of " + ", ".join(f"{key!r} ({type(value).__name__})" for key, value in list(held.items())[:12])


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = dict(state)
    while prefix := next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name[len(prefix) :]: tensor for name, tensor in state.items()}
    return state


def image_tensor(image: Image.Image, channels: int) -> Tensor:
    """(C, H, W) in [0, 1]; 16-bit grey images keep their depth."""
    if image.mode[0] == "I" and channels == 1:  # I;16, or I where Pillow has read 16 bits into 32
        return torch.from_numpy(np.asarray(image).astype(np.float32))[None] / 65535
    pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels).reshape(*pixels.shape[:2], channels).permute(2, 0, 1).contiguous()

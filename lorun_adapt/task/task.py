"""Task files: what ties a network to images.

A task file is a Python file (or ``package.module``) with

    def build() -> nn.Module: ...               # the network, untrained
    def measure(images, sigma=0.0): ...         # (B, C, H, W) in [0, 1] -> the arguments of the network's forward
    def restore(output, images): ...            # what the forward returned -> images, same shape

and optionally

    channels, patch, border, tile               # where the defaults of Task do not fit
    weights, weights_key                        # the file of the trained weights, and their key in it
    def arguments(arrays): ...                  # measured arrays, by name -> the arguments of the network's forward
    def read(path): ...                         # an image file -> (C, H, W) in [0, 1]
    def load(path, net): ...                    # a weights file -> a state_dict of the network
    def schedule(net, sigmas): ...              # give each stage its noise level, for sets of several noise levels
    def noise_level(arguments): ...             # the arguments of a forward -> the sigma of the measurements
    def picture(images): ...                    # images of other than 1 or 3 channels -> (B, 3, H, W), to look at
    license, base_model                         # for the model card
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import LoRunError
from ..util.nested import map_tensors, tensors_in
from ..util.numbers import is_whole_number
from ..util.text import SHORT, is_short
from .cubes import CUBE_SUFFIXES, read_cube
from .images import IMAGE_SUFFIXES, check_range, read_image
from .user_code import how_to_install, line_of, module_by_name, module_of_file, own_command_line
from .weights import choose_state, mismatch, read_states


@dataclass(frozen=True)
class Task:
    """A task file, read and checked; see :func:`load_task`.

    Attributes:
        name: the file or module that it was read from.
        module: the Python module.
        channels: the number of image channels.
        patch: the side, in pixels, of the crops to train on, and of the image that ``inspect`` runs on.
        border: how many pixels at each side the metrics leave out.
        tile: if the network is local, the side of the blocks that it works on, 1 without blocks: large images may be
            restored in tiles of a multiple of it.
        weights: the original network's weights, used when none are given.
        weights_key: the key under which they are in the file.
        license: the license that the model card names.
        base_model: the repository of the Hub that holds the original network, for the model card.

    >>> import tempfile
    >>> text = '''
    ... from torch import nn
    ... patch = 8
    ... def build(): return nn.Conv2d(1, 1, 3, padding=1)
    ... def measure(images, sigma=0.0): return (images / 2,)
    ... def restore(output, images): return output.clamp(0, 1)
    ... '''
    >>> with tempfile.TemporaryDirectory() as here:
    ...     _ = (Path(here) / "halved.py").write_text(text)
    ...     task = load_task(str(Path(here) / "halved.py"))
    >>> images = torch.rand(2, 1, 8, 8)
    >>> task.run(task.build(), task.measure(images), images).shape
    torch.Size([2, 1, 8, 8])
    """

    name: str
    module: ModuleType
    channels: int = 1
    patch: int = 96
    border: int = 0
    tile: int | None = None
    weights: Path | None = None
    weights_key: str | None = None
    license: str | None = None
    base_model: str | None = None

    @property
    def title(self) -> str:
        """The first line of the file's docstring, or the task's name."""
        lines = (self.module.__doc__ or "").strip().splitlines()
        return lines[0].strip() if lines else self.name

    @property
    def reads_itself(self) -> bool:
        """Whether the task has a ``read(path)`` of its own."""
        return hasattr(self.module, "read")

    @property
    def schedule(self) -> Callable[[nn.Module, Sequence[float]], None] | None:
        """The task's ``schedule(net, sigmas)``, which gives each stage its noise level (0..255), or None."""
        return self._optional("schedule")

    @property
    def noise_level(self) -> Callable[[tuple[Any, ...]], float] | None:
        """The task's ``noise_level(arguments)``, which estimates sigma (0..255) from a forward's, or None."""
        return self._optional("noise_level")

    @property
    def arguments(self) -> Callable[[dict[str, Tensor]], tuple[Any, ...]] | None:
        """The task's ``arguments(arrays)``, which makes a forward's arguments from measured arrays, or None."""
        function = self._optional("arguments")
        return None if function is None else lambda arrays: self._checked("arguments", function(arrays))

    def _optional(self, function: str) -> Callable[..., Any] | None:
        return functools.partial(self._call, function) if callable(getattr(self.module, function, None)) else None

    def build(self) -> nn.Module:
        """Return the network, in evaluation mode, with the weights that the task's ``build()`` gives it.

        Raises:
            LoRunError: the task's function fails, or returns something else.
        """
        net = self._call("build")
        if not isinstance(net, nn.Module):
            raise LoRunError(
                f"expected build() of {self.name} to return an nn.Module, found {type(net).__name__}: return one"
            )
        return net.eval()

    def measure(self, images: Tensor, sigma: float = 0.0) -> tuple[Any, ...]:
        """Return the arguments of the network's forward for ``images`` (B, C, H, W) in [0, 1].

        Args:
            images: what is measured.
            sigma: noise on the measurements (0..255).

        Raises:
            LoRunError: the task's function fails, or returns no tuple.
        """
        arguments = self._call("measure", images, sigma=sigma) if sigma else self._call("measure", images)
        return self._checked("measure", arguments)

    def _checked(self, function: str, arguments: Any) -> tuple[Any, ...]:
        """The arguments of a forward that a function of the task has returned, without the graph that made them."""
        if not isinstance(arguments, (tuple, list)):
            raise LoRunError(
                f"expected {function}() of {self.name} to return a tuple of arguments, found "
                f"{type(arguments).__name__}: write `return (y,)` for one"
            )
        if any(tensor.requires_grad for tensor in tensors_in(arguments)):
            return tuple(map_tensors(item, Tensor.detach) for item in arguments)
        return tuple(arguments)

    def run(self, net: nn.Module, arguments: tuple[Any, ...], images: Tensor) -> Tensor:
        """Run ``net`` on ``arguments`` and return the restored images, on the CPU, in float32.

        Args:
            net: the network, or its conversion.
            arguments: what :meth:`measure` returned, on the device of ``net``.
            images: the images that were measured, (B, C, H, W); the result has their shape.

        Raises:
            LoRunError: the forward or the task's function fails.
        """
        return self.restored(self.run_forward(net, arguments), images).detach().float().cpu()

    def run_forward(self, net: nn.Module, arguments: tuple[Any, ...]) -> Any:
        """Return what the network's forward returns, without gradients.

        Raises:
            LoRunError: the forward fails.
        """
        with torch.no_grad():  # not inference_mode, as some forwards compute gradients within
            return self._guard("the network's forward", net, *arguments)

    def image_in(self, output: Any) -> Tensor:
        """Return the restored image (C, H, W) in ``output``, where only measurements are known: float32, on the CPU.

        Raises:
            LoRunError: the task's ``restore`` cannot do without the images, or returns another number of images.
        """
        restored = self._call("restore", output, None)
        if not isinstance(restored, Tensor) or restored.ndim != 4 or restored.shape[:2] != (1, self.channels):
            raise LoRunError(
                f"expected restore() of {self.name} to return one image (1, {self.channels}, H, W), found "
                f"{_shape_or_type(restored)}: it gets None for the images where only measurements are known"
            )
        return restored[0].detach().float().cpu()

    def restored(self, output: Any, images: Tensor) -> Tensor:
        """Return the restored images in ``output``, which the network's forward returned, in the shape of ``images``.

        Raises:
            LoRunError: the task's function fails, or returns another shape.
        """
        restored = self._call("restore", output, images)
        if not isinstance(restored, Tensor) or restored.shape != images.shape:
            raise LoRunError(
                f"expected restore() of {self.name} to return images of shape {tuple(images.shape)}, found "
                f"{_shape_or_type(restored)}: cut off what measure() added"
            )
        return restored

    def example_inputs(self) -> tuple[Any, ...]:
        """Return the arguments of the network's forward for one random image of ``patch`` pixels a side."""
        generator = torch.Generator().manual_seed(0)
        return self.measure(torch.rand(1, self.channels, self.patch, self.patch, generator=generator))

    def picture(self, images: Tensor) -> Tensor:
        """Return ``images`` (B, C, H, W) to look at, with 1 or 3 channels, in [0, 1].

        Images of other channels are shown as the task's ``picture`` says, or else by the mean of their channels.

        Raises:
            LoRunError: the task's function fails, or returns another shape.
        """
        count, channels, *sides = images.shape
        if channels in (1, 3):
            return images.clamp(0, 1)
        show = self._optional("picture")
        if show is None:
            return images.mean(1, keepdim=True).clamp(0, 1)
        shown = show(images)
        if not isinstance(shown, Tensor) or shown.shape not in [(count, c, *sides) for c in (1, 3)]:
            raise LoRunError(
                f"expected picture() of {self.name} to return images of shape {(count, 3, *sides)}, found "
                f"{_shape_or_type(shown)}: change it in the task file"
            )
        return shown.float().clamp(0, 1)

    def images(self, folder: Path) -> list[Path]:
        """Return the image files of ``folder``, sorted by name; all files where the task defines ``read``.

        Images of other than 1 or 3 channels are array files (NumPy, MATLAB, HDF5), and TIFF with a page a channel.

        Raises:
            LoRunError: there is no such folder, or no image file in it.
        """
        if not folder.is_dir():
            raise LoRunError(f"no folder of images at {folder}: give an existing folder")
        suffixes = IMAGE_SUFFIXES if self.channels in (1, 3) else CUBE_SUFFIXES

        def is_image(path: Path) -> bool:
            is_known = self.reads_itself or path.suffix.lower() in suffixes
            return path.is_file() and not path.name.startswith(".") and is_known

        files = sorted(filter(is_image, folder.iterdir()))
        if not files:
            within = sorted({path.parent for path in folder.glob("[!.]*/*") if is_image(path)})
            if within:
                raise LoRunError(f"no image files in {folder} itself: give a folder within it, such as {within[0]}")
            raise LoRunError(f"no image files in {folder}: give a folder with files such as {min(suffixes)}")
        return files

    def read(self, path: Path) -> Tensor:
        """Read an image file as a tensor of shape (C, H, W), float32 in [0, 1].

        Raises:
            LoRunError: the file is no image, or the task's ``read`` fails or returns another number of channels.
        """
        if self.reads_itself:
            image = self._guard(f"read() of {self.name} for {path}", self.module.read, path)
            if not isinstance(image, Tensor) or image.ndim != 3 or image.shape[0] != self.channels:
                raise LoRunError(
                    f"expected read() of {self.name} to return a tensor ({self.channels}, H, W), found "
                    f"{_shape_or_type(image)} for {path}: change read(), or channels"
                )
            check_range(image, f"what read() of {self.name} returns for {path}", "divide by the largest possible value")
            return image.float()
        return read_image(path, self.channels) if self.channels in (1, 3) else read_cube(path, self.channels)

    def load_weights(self, net: nn.Module, path: Path | None, key: str | None = None) -> None:
        """Load the weights file ``path``, or else the task's own, into ``net``.

        Args:
            net: the network.
            path: a file of torch or safetensors.
            key: under which key of the file the weights are, parts joined by dots; by default the task's
                ``weights_key``, or else those that fit the network, and of several the averaged ones.

        Raises:
            LoRunError: no file is given or there is none, it cannot be read, or it is for another network.
        """
        path = path or self.weights
        if path is None:
            raise LoRunError(f"no weights for {self.name}: give --weights, or set weights in the task")
        if not path.is_file():
            raise LoRunError(f"no weights file at {path}: give an existing file")
        has_load = hasattr(self.module, "load")
        if has_load and key is not None:
            raise LoRunError(f"{self.name} has a load() of its own, which takes no --weights-key: leave the key out")
        if has_load:
            state = self._call("load", path, net)
        else:
            state = choose_state(read_states(path), net, path, key or self.weights_key)
        try:
            net.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:
            detail = mismatch(net, state) if _is_state_dict(state) else " ".join(str(error).split())[:600]
            raise LoRunError(
                f"the weights in {path} do not fit {type(net).__name__}: {detail}; build the network they are for"
                f"{'' if has_load else ', or define load(path, net) in the task'}"
            ) from error

    def _call(self, function: str, *args: Any, **kwargs: Any) -> Any:
        return self._guard(f"{function}() of {self.name}", getattr(self.module, function), *args, **kwargs)

    def _guard(self, what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            with own_command_line(self.name):
                return function(*args, **kwargs)
        except LoRunError:
            raise
        except Exception as error:
            raise LoRunError(f"{what} failed with {type(error).__name__}: {error}; see {line_of(error)}") from error


def load_task(name: str | os.PathLike[str]) -> Task:
    """Read a task file, or import a task module.

    Args:
        name: the path of a ``.py`` file, or a module's name such as ``package.module``.

    Raises:
        LoRunError: there is no such file or module, it fails, or a function is missing or an option wrong.

    >>> load_task("examples/no_such_task.py")
    Traceback (most recent call last):
        ...
    lorun_adapt.errors.LoRunError: no task file at examples/no_such_task.py: give an existing .py file
    """
    name = os.fspath(name)
    try:
        with own_command_line(name):
            module = module_of_file(Path(name)) if name.endswith(".py") else module_by_name(name)
    except LoRunError:
        raise
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise LoRunError(f"no task module {name} ({error}): check the name, or give a .py file") from error
        if isinstance(error, ModuleNotFoundError) and error.name is not None:
            raise LoRunError(
                f"{name} needs {error.name}, which is not installed, see {line_of(error)}: {how_to_install(error.name)}"
            ) from error
        raise LoRunError(
            f"cannot load the task {name}: {type(error).__name__}: {error}; see {line_of(error)}"
        ) from error
    for function in ("build", "measure", "restore"):
        if not callable(getattr(module, function, None)):
            raise LoRunError(f"{name} has no function {function}(): a task file needs build, measure and restore")
    options: dict[str, Any] = {}
    for option, least in (("channels", 1), ("patch", 1), ("border", 0), ("tile", 1)):
        value = getattr(module, option, None)
        if value is not None:
            if not is_whole_number(value, least):
                raise LoRunError(
                    f"expected {option} in {name} to be a whole number of at least {least}, found {value!r}: correct "
                    "it in the task file"
                )
            options[option] = value
    for option in ("license", "base_model", "weights_key"):
        value = getattr(module, option, None)
        if value is not None:
            if not is_short(value):
                raise LoRunError(
                    f"expected {option} in {name} to be one line of at most {SHORT} characters, found "
                    f"{str(value)[:300]!r}: correct it in the task file"
                )
            options[option] = value
    weights = getattr(module, "weights", None)
    if weights is not None:
        if not isinstance(weights, (str, os.PathLike)):
            raise LoRunError(f"expected weights in {name} to be the path of a file, found {weights!r}: correct it")
        options["weights"] = Path(module.__file__ or ".").parent / weights
    return Task(name, module, **options)


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(item, Tensor) for item in value.values())


def _shape_or_type(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__

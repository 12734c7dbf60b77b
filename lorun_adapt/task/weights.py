"""Reading a trained network's weights from the files in which authors publish them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import LoRunError

STATE_KEYS = ("state_dict", "model", "net", "params", "params_ema")
PREFIXES = ("module.", "_orig_mod.")  # left by nn.DataParallel and torch.compile


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Return the state_dict in a safetensors or torch file, without the prefixes that wrappers add to names.

    In a torch file, it may stand by itself or under one of ``STATE_KEYS``.

    Raises:
        LoRunError: the file is damaged, holds objects other than tensors, or no state_dict.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as here:
    ...     torch.save({"state_dict": {"module.step": torch.ones(1)}, "epoch": 3}, Path(here) / "net.pth")
    ...     read_state_dict(Path(here) / "net.pth")
    {'step': tensor([1.])}
    """
    if path.suffix == ".safetensors":
        try:
            return _without_prefix(load_file(path))
        except SafetensorError as error:
            raise LoRunError(f"{path} is a damaged safetensors file: {error}; download it again") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds, pickle.UnpicklingError among them
        raise LoRunError(
            f"cannot read tensors from {path}: {type(error).__name__}: {str(error).splitlines()[0]}; if it holds other "
            "objects, save its state_dict by itself, or define load(path, net) in the task"
        ) from error
    state = _state_dict_in(content, 2)
    if state is None:
        raise LoRunError(
            f"expected a state_dict in {path}, found {_summary(content)}: define load(path, net) in the task"
        )
    return _without_prefix(state)


def _state_dict_in(content: object, depth: int) -> Mapping[str, Tensor] | None:
    """The first mapping of tensors in ``content`` or under its keys, up to ``depth`` keys deep."""
    if not isinstance(content, Mapping):
        return None
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return content
    inner = (_state_dict_in(content[key], depth - 1) for key in STATE_KEYS if key in content and depth)
    return next((state for state in inner if state is not None), None)


def _summary(content: object) -> str:
    if not isinstance(content, Mapping):
        return type(content).__name__
    return "a dict of " + ", ".join(f"{key!r} ({type(value).__name__})" for key, value in list(content.items())[:12])


def _without_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = dict(state)
    while prefix := next((p for p in PREFIXES if state and all(name.startswith(p) for name in state)), None):
        state = {name[len(prefix) :]: tensor for name, tensor in state.items()}
    return state

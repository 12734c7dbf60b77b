"""The state of a training run in one safetensors file, from which it goes on exactly where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..disk.folder import write_file
from ..errors import LoRunError

FORMAT = "lorun_adapt training state 1"


def write_state(path: Path, kind: str, state: Mapping[str, Any]) -> None:
    """Write nested dicts, lists, numbers, strings and tensors; ``kind`` says what run they are of."""
    tensors: dict[str, Tensor] = {}
    content = _packed(tensors, state)
    metadata = {"format": FORMAT, "kind": kind, "state": json.dumps(content)}
    write_file(path, lambda file: file.write(save(tensors, metadata)))


def _packed(tensors: dict[str, Tensor], value: Any) -> Any:
    """``value`` as JSON can hold it; its tensors go to ``tensors``."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous().clone()
        return {"tensor": [name, value.stride()]}
    if isinstance(value, Mapping):
        return {"dict": [[key, _packed(tensors, item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_packed(tensors, item) for item in value]}
    if isinstance(value, list):
        return {"list": [_packed(tensors, item) for item in value]}
    return {"value": value}


def read_state(path: Path, kind: str) -> dict[str, Any]:
    """What :func:`write_state` wrote.

    Raises:
        LoRunError: a file that is something else, is damaged, or is of another run.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise LoRunError(
            f"expected a training state, found {error} in {path}: remove the file to begin anew"
        ) from error
    if metadata.get("format") != FORMAT:
        raise LoRunError(
            f"expected a training state, found another safetensors file at {path}: give resume_from= another path"
        )
    if metadata.get("kind") != kind:
        raise LoRunError(
            f"expected the training state of this network, config and seed, found one of another run in {path}: "
            "remove the file to begin anew, or give resume_from= another path"
        )
    return _restored(json.loads(metadata["state"]), tensors)


def _restored(value: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = value.items()
    if kind == "tensor":
        name, stride = content  # the layout in memory decides in which order numbers are added up
        value = tensors[name]
        return torch.empty_strided(value.shape, stride, dtype=value.dtype).copy_(value)
    if kind == "dict":
        return {key: _restored(item, tensors) for key, item in content}
    if kind == "value":
        return content
    items = [_restored(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items

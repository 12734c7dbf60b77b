"""The state of a training run in one safetensors file, from which the run resumes exactly."""

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

FORMAT = "lorun_adapt training state 2"


def write_state(path: Path, run_id: str, state: Mapping[str, Any]) -> None:
    """Write the state of a run: nested dicts, lists, tuples, numbers, strings and tensors.

    Args:
        run_id: identifies the run, so that no other run resumes from the file.
    """
    tensors: dict[str, Tensor] = {}
    content = _to_json(tensors, state)
    metadata = {"format": FORMAT, "kind": run_id, "state": json.dumps(content)}
    write_file(path, lambda file: file.write(save(tensors, metadata)))


def _to_json(tensors: dict[str, Tensor], value: Any) -> Any:
    """``value`` as JSON can hold it; its tensors are added to ``tensors``."""
    if isinstance(value, Tensor) and value.is_complex():  # safetensors has no complex numbers of 128 bits
        return {"complex": _to_json(tensors, torch.view_as_real(value.detach()))}
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().contiguous().clone()
        return {"tensor": [name, value.stride()]}
    if isinstance(value, Mapping):
        return {"dict": [[key, _to_json(tensors, item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_to_json(tensors, item) for item in value]}
    if isinstance(value, list):
        return {"list": [_to_json(tensors, item) for item in value]}
    return {"value": value}


def run_id_of(path: Path) -> str:
    """The run that a state file belongs to; empty if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return str((file.metadata() or {}).get("kind", ""))
    except (SafetensorError, OSError):
        return ""


def read_state(path: Path, run_id: str) -> dict[str, Any]:
    """Read the state that :func:`write_state` wrote for the run ``run_id``.

    Raises:
        LoRunError: the file is damaged, is no state file, or belongs to another run.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise LoRunError(f"cannot read the state file {path}: {error}; remove it to start anew") from error
    if metadata.get("format") != FORMAT:
        raise LoRunError(
            f"{path} is a safetensors file, but not the state file of a training run: give resume_from= another path"
        )
    if metadata.get("kind") != run_id:
        raise LoRunError(
            f"the state file {path} belongs to another run, with another network, config, calibration or seed: "
            "remove it to start anew, or give resume_from= another path"
        )
    return _from_json(json.loads(metadata["state"]), tensors)


def _from_json(value: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, content),) = value.items()
    if kind == "tensor":
        name, stride = content  # the layout in memory decides in which order numbers are added up
        tensor = tensors[name]
        return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
    if kind == "complex":
        return torch.view_as_complex(_from_json(content, tensors))
    if kind == "dict":
        return {key: _from_json(item, tensors) for key, item in content}
    if kind == "value":
        return content
    items = [_from_json(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items

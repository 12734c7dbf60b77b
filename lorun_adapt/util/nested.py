"""Tensors in the nested lists, tuples, dicts and dataclasses that forwards take and return."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def tensors_in(value: Any) -> list[Tensor]:
    """The floating-point and complex tensors in ``value``, in a fixed order."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() or value.is_complex() else []
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for field in dataclasses.fields(value) for t in tensors_in(getattr(value, field.name))]
    return []


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` on ``device``: tensors (as copies), lists, tuples, dicts, and whatever has ``.to``."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (list, tuple)) and not hasattr(value, "to"):
        return type(value)(to_device(item, device) for item in value)
    return value.to(device) if hasattr(value, "to") and not isinstance(value, type) else value


def device_of(network: nn.Module) -> torch.device:
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """``value`` with ``new`` in the place of ``old``: within lists, tuples, dicts and dataclasses."""
    if value is old:
        return new
    if isinstance(value, Mapping):
        return {key: replaced(item, old, new) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(replaced(item, old, new) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(replaced(item, old, new) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: replaced(getattr(value, name), old, new) for name in names})
    return value

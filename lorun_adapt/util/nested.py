"""Tensors in the nested lists, tuples, dicts and dataclasses that forwards take and return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .numbers import is_numeric


def tensors_in(value: Any) -> list[Tensor]:
    """Return the floating-point and complex tensors in ``value``, in a fixed order.

    >>> tensors_in({"image": torch.ones(1), "more": [torch.arange(3), (torch.zeros(2), None)]})
    [tensor([1.]), tensor([0., 0.])]
    """
    if isinstance(value, Tensor):
        return [value] if is_numeric(value) else []
    if isinstance(value, Mapping):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [t for field in dataclasses.fields(value) for t in tensors_in(getattr(value, field.name))]
    return []


def num_bytes(value: Any) -> int:
    """Return how much memory the floating-point and complex tensors in ``value`` take, each counted once.

    >>> image = torch.ones(4)
    >>> num_bytes([image, {"again": image}])
    16
    """
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors_in(value)}.values())


def to_device(value: Any, device: torch.device) -> Any:
    """Return ``value`` on ``device``: copies of its tensors, within lists, tuples, dicts and objects with ``.to``.

    >>> to_device((torch.ones(2), {"sigma": 25}), torch.device("meta"))
    (tensor(..., device='meta', size=(2,)), {'sigma': 25})
    """
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (list, tuple)) and not hasattr(value, "to"):
        return type(value)(to_device(item, device) for item in value)
    return value.to(device) if hasattr(value, "to") and not isinstance(value, type) else value


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return ``value`` with ``function(tensor)`` in place of each tensor, within lists, tuples, dicts and dataclasses.

    >>> map_tensors({"image": torch.zeros(1), "steps": [1, torch.ones(1)]}, lambda tensor: tensor + 1)
    {'image': tensor([1.]), 'steps': [1, tensor([2.])]}
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(item, function) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, function) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(item, function) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: map_tensors(getattr(value, name), function) for name in names})
    return value


def device_of(network: nn.Module) -> torch.device:
    """Return the device of the first parameter, or the CPU where ``network`` has none.

    >>> device_of(nn.Linear(1, 1, device="meta"))
    device(type='meta')
    """
    return next((p.device for p in network.parameters()), torch.device("cpu"))


def replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    """Return ``value`` with ``new`` in place of ``old``, within lists, tuples, dicts and dataclasses.

    >>> image = torch.zeros(1)
    >>> replaced({"image": image, "steps": [1, 2]}, image, torch.ones(1))
    {'image': tensor([1.]), 'steps': [1, 2]}
    """
    return map_tensors(value, lambda tensor: new if tensor is old else tensor)

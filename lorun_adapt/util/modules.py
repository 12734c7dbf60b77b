"""."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """``eval()`` within the block, and each module's own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def buffer_names(network: nn.Module) -> set[str]:
    return {name for name, _, buffer in tensors_of(network) if buffer}


def copy_network(
    network: nn.Module, *, share_tensors: bool = False, memo: dict[int, object] | None = None
) -> nn.Module:
    """``copy.deepcopy`` of a network, or, with ``share_tensors``, of its modules around the same tensors.

    Activations that modules keep as attributes, which deepcopy refuses, are taken without their graph.
    """
    memo = {} if memo is None else memo
    if share_tensors:
        memo.update({id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())})
    for module in network.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(network, memo)


def distinct_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each once, under the first of its names."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor, _ in tensors_of(network):
        found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def owner_of(denoiser: nn.Module, name: str) -> tuple[int, str]:
    """Where a tensor is, so that one reached in two ways is known as one: (its module's id, attribute)."""
    path, _, attribute = name.rpartition(".")
    return id(denoiser.get_submodule(path)), attribute


def tensor_of(module: nn.Module, name: str) -> Tensor:
    """The tensor of that name, relative to ``module``."""
    path, _, attribute = name.rpartition(".")
    return getattr(module.get_submodule(path), attribute)


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """All names of all parameters and persistent buffers: (name, tensor, is it a buffer)."""
    found: list[tuple[str, Tensor, bool]] = []
    for path, child in module.named_modules(remove_duplicate=False):
        prefix = path + "." if path else ""
        found += [(prefix + name, p, False) for name, p in child._parameters.items() if p is not None]
        found += [
            (prefix + name, b, True)
            for name, b in child._buffers.items()
            if b is not None and name not in child._non_persistent_buffers_set
        ]
    return found


def has_valid_values(tensor: Tensor, buffer: bool) -> bool:
    """Whether a tensor can be a trained network's: no NaN, and no Inf but in a buffer, as a mask has it."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return not bool(torch.isnan(tensor).any()) if buffer else bool(torch.isfinite(tensor).all())

"""Tensors that several modules share: find them, and restore them after they were replaced by separate ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..errors import LoRunError
from ..util.modules import owner_of

Places = list[list[tuple[dict[str, Any], str]]]  # for each shared tensor, the dicts that hold it, and its key in them


def shared_places(*roots: nn.Module) -> Places:
    """Return the places in ``roots`` that hold the same tensor."""
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}
    for root in roots:
        for module in root.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is not None:
                        places.setdefault(id(tensor), []).append((held, name))
    return [group for group in places.values() if len(group) > 1]


def share_again(places: Places) -> None:
    """Copy the tensor at the first of the places to the others."""
    for (first, name), *others in places:
        for held, other in others:
            held[other] = first[name]


def ties_of(network: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Return the names of parameters that modules tie, those of one parameter together.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> net[1].weight = net[0].weight
    >>> ties_of(net)
    (('0.weight', '1.weight'),)
    """
    places: dict[int, dict[object, str]] = {}  # by parameter, its names by the places in modules that hold it
    for name, parameter in network.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), {}).setdefault(owner_of(network, name), name)
    return tuple(tuple(names.values()) for names in places.values() if len(names) > 1)


def tie_again(network: nn.Module, ties: Sequence[tuple[str, ...]]) -> None:
    """Let modules of ``network`` share parameters again, which are named as :func:`ties_of` returns them.

    Raises:
        LoRunError: the values of two of them differ.
    """
    for first, *others in ties:
        parameter = network.get_parameter(first)
        for name in others:
            if not torch.equal(network.get_parameter(name), parameter):
                raise LoRunError(
                    f"cannot merge {name!r}: the original network ties it to {first!r}, and the adapters of the two "
                    "differ; keep the LoRunModel and save it with save_pretrained"
                )
            path, _, attribute = name.rpartition(".")
            setattr(network.get_submodule(path), attribute, parameter)

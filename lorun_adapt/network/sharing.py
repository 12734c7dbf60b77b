"""Restore shared tensors after torch has replaced them by separate ones."""

from __future__ import annotations

from typing import Any

from torch import nn

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

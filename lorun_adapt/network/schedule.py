"""Set the noise schedule of the active adapters in a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..terms.term import Term
from .separate import COPIES


@torch.no_grad()
def apply_schedule(
    network: nn.Module, schedule: Callable[[nn.Module, list[float]], object], sigmas: list[float]
) -> None:
    """Call ``schedule(network, sigmas)`` without affecting other networks that share the network's tensors.

    Tensors that ``schedule`` changes in place become the network's own. Attributes that it sets on a module with copies
    are set on the copies too, unless it sets them there itself.

    Args:
        network: the network to change.
        schedule: sets the noise schedule in the network.
        sigmas: one standard deviation for each stage, on a scale of 0 to 255.
    """
    held = [
        (module, name, tensor)
        for module in network.modules()
        if not isinstance(module, Term)  # terms are shared with other networks and the adapter sets
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    ]
    own: dict[int, Tensor] = {}
    for module, name, tensor in held:
        if id(tensor) not in own:
            value = tensor.detach().clone()
            own[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
        setattr(module, name, own[id(tensor)])
    copies = vars(network).get(COPIES, ())
    before = {id(module): dict(vars(module)) for pair in copies for module in pair}
    schedule(network, sigmas)
    unchanged = {id(tensor) for _, _, tensor in held if _same(own[id(tensor)], tensor)}
    applied = set()
    for module, name, tensor in held:
        now = module._parameters.get(name, module._buffers.get(name))
        if id(tensor) in unchanged and now is own[id(tensor)]:
            setattr(module, name, tensor)
        else:
            applied.add((id(module), name))
    for module, duplicate in copies:
        first, second = before[id(module)], before[id(duplicate)]
        for name, value in vars(module).items():
            if first.get(name, first) is not value and vars(duplicate).get(name, second) is second.get(name, second):
                vars(duplicate)[name] = value
        for tensors, others in ((module._parameters, duplicate._parameters), (module._buffers, duplicate._buffers)):
            for name in tensors.keys() & others.keys():
                if (id(module), name) in applied and (id(duplicate), name) not in applied:
                    others[name] = tensors[name]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a == b).logical_or(a.isnan() & b.isnan()).all())

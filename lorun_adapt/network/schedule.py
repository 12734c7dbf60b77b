"""Hand a network the noise schedule that its adapters are for."""

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
    """Hand a network the noise of its stages, and leave other networks that share its tensors as they are.

    Tensors that ``schedule`` changes in place become the network's own. What it sets on a module that runs as copies
    is set on the copies too, unless it sets that on them itself.

    Args:
        schedule: called with ``network`` and ``sigmas``.
        sigmas: one for each stage, on a scale of 0 to 255.
    """
    held = [
        (module, name, tensor)
        for module in network.modules()
        if not isinstance(module, Term)  # which other networks and the adapters hold as well
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

"""What is known of each tensor of a denoiser from the modules that repeat it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from ..util.modules import equal, tensors_of
from .stage_map import Site, TensorSpec


def tensor_specs(dun: nn.Module, sites: Sequence[Site], common: set[str] | None = None) -> tuple[TensorSpec, ...]:
    """Return the specs of the tensors of a group's denoiser, from the modules at its sites.

    Args:
        dun: the network.
        sites: where the denoisers are; they are built alike.
        common: names of the tensors that are the same in all stages. Without it, the values of the tensors decide.

    >>> dun = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    >>> [(spec.name, spec.shape, spec.common) for spec in tensor_specs(dun, [Site(0, "0"), Site(1, "1")])]
    [('weight', (2, 3), False), ('bias', (2,), False)]
    """
    modules = [dun.get_submodule(site.module) for site in sites]
    tables = [{name: tensor for name, tensor, _ in tensors_of(module)} for module in modules]
    names: dict[int, list[str]] = {}
    buffers = {}
    for name, tensor, buffer in tensors_of(modules[0]):
        names.setdefault(id(tensor), []).append(name)
        buffers[name] = buffer
    specs = []
    any_trains = any(parameter.requires_grad for parameter in dun.parameters())
    for aliases in names.values():
        name = aliases[0]
        tensor, path = tables[0][name], name.rpartition(".")[0]
        owners = [module.get_submodule(path) for module in modules]
        same = all(other[name] is tensor for other in tables)
        frozen = not buffers[name] and any_trains and not any(other[name].requires_grad for other in tables)
        if common is not None:
            is_common = name in common
        elif buffers[name] or frozen:
            # Running statistics drift apart in training; other buffers that agree are constants.
            moving = isinstance(owners[0], nn.modules.batchnorm._NormBase)
            is_common = not moving and (same or all(equal(other[name], tensor) for other in tables))
        else:
            is_common = same and len({id(owner) for owner in owners}) > 1
        owner = type_before_parametrizations(owners[0])
        shape = tuple(tensor.shape)
        specs.append(TensorSpec(name, shape, tensor.dtype, buffers[name], tuple(aliases), owner, frozen, is_common))
    return tuple(specs)

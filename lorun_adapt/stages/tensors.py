"""The tensors of a network with shared stages: the base's, each stage's, and those outside the stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..util.modules import distinct_tensors, tensor_of
from .stage_map import Group, Site, StageMap, TensorSpec


def base_tensors(base: nn.Module, stage_map: StageMap) -> dict[str, Tensor]:
    """Return the tensors of ``base`` by name, without the zeros that stand in where a tensor has no base."""
    zeros = {
        id(tensor)
        for group in stage_map.groups
        for spec in group.tensors
        if spec.without_base
        for tensor in stage_parameters(base, group, spec)
    }
    return {name: tensor for name, tensor in distinct_tensors(base).items() if id(tensor) not in zeros}


def base_denoiser(base: nn.Module, stage_map: StageMap, group: Group, site: Site) -> nn.Module:
    """Return the denoiser that PEFT loads the adapter at ``site`` on: the shared one, or else the stage's own."""
    return base.get_submodule((group.sites[0] if stage_map.shared else site).module)


def outside_parameters(base: nn.Module, stage_map: StageMap) -> dict[str, nn.Parameter]:
    """Return the parameters outside the stages: step sizes kept beside them, condition networks, heads and tails.

    Parameters that the authors tie between all stages are among them.
    """
    inside = {
        id(tensor)
        for group in stage_map.groups
        for spec in group.tensors
        if not spec.common
        for tensor in stage_parameters(base, group, spec)
    }
    return {
        name: tensor
        for name, tensor in distinct_tensors(base).items()
        if isinstance(tensor, nn.Parameter) and id(tensor) not in inside
    }


def stage_stacks(dun: nn.Module, group: Group) -> dict[str, Tensor]:
    """Return the values of all stages, as :func:`stage_stack`, by the names of the tensors that are the stages' own."""
    return {spec.name: stage_stack(dun, group, spec) for spec in group.tensors if not spec.common}


def stage_stack(dun: nn.Module, group: Group, spec: TensorSpec) -> Tensor:
    """Return the values of a tensor in all stages, (N, *shape).

    They are on the CPU: the matrices are small, and not every accelerator supports float64.
    """
    return torch.stack([tensor.cpu() for tensor in stage_values(dun, group, spec)])


def stage_values(dun: nn.Module, group: Group, spec: TensorSpec) -> list[Tensor]:
    """Return the values of the tensor at each site, detached, in the order of the stages."""
    return [tensor.detach() for tensor in stage_parameters(dun, group, spec)]


def stage_parameters(network: nn.Module, group: Group, spec: TensorSpec) -> list[Tensor]:
    """Return the parameter, or buffer, itself at each site, in the order of the stages."""
    return [tensor_of(network.get_submodule(site.module), spec.name) for site in group.sites]

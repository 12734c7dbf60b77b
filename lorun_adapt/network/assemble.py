"""Build networks whose stages share one base: the base itself, a network with adapters, and a merged network.

A network with adapters is a copy of the base that shares all tensors with it; its stages read their tensors through
the adapters' terms. Such copies are cheap, so that swapping adapters replaces the whole network, and a forward that is
running during a swap finishes on the network it started with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import LoRunError
from ..stages.stage_map import Group, StageMap, TensorSpec
from ..terms.term import Term
from ..util.copying import copy_network, tensors_beside_modules
from ..util.modules import owner_of, tensor_of
from .adapted import add_term
from .adapter import StageAdapter, private_tensors, terms_of
from .calls import count_calls, tell_calls_apart
from .converted import Choice
from .dense import dense_tensors, weighted_sum_of_tensors
from .separate import COPIES, separate_stages


def copy_for_base(dun: nn.Module, stage_map: StageMap) -> nn.Module:
    """Return a copy of ``dun`` for :func:`share_base`, whose stages hold the first stage's tensors already.

    Only tensors that no module outside the stages holds are left out: the base takes the place of these.
    """
    inside = {id(m) for site in stage_map.sites for m in dun.get_submodule(site.module).modules()}
    others = [tensor for _, module in dun.named_modules() if id(module) not in inside for tensor in _own(module)]
    kept = {id(tensor) for tensor in (*others, *tensors_beside_modules(dun))}
    replaced: dict[int, Tensor] = {}
    for group in stage_map.groups:
        for spec in group.tensors:
            tensors = [tensor_of(dun.get_submodule(site.module), spec.name) for site in group.sites]
            if spec.common or any(id(tensor) in kept for tensor in tensors):
                continue
            first = tensors[0].detach().clone()
            copied = first if spec.buffer else nn.Parameter(first, tensors[0].requires_grad)
            replaced.update({id(tensor): copied for tensor in tensors})
    return copy_network(dun, replaced=replaced)


def _own(module: nn.Module) -> list[Tensor]:
    return [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]


def share_base(network: nn.Module, group: Group, values: Mapping[str, Tensor]) -> None:
    """Make all sites of ``group`` in ``network`` share one copy of each tensor in ``values``."""
    modules = [network.get_submodule(site.module) for site in group.sites]
    for spec in group.tensors:
        if spec.common:
            continue
        first = tensor_of(modules[0], spec.name)
        value = values[spec.name].to(first).contiguous()  # the mean of transposed views is not contiguous
        base = value if spec.buffer else nn.Parameter(value, requires_grad=False)
        for module in modules:
            put_tensor(module, spec, base)


def assemble(
    base: nn.Module,
    stage_map: StageMap,
    choice: Choice,
    outside: Mapping[str, Tensor] | None = None,
    repeats_last: bool = False,
) -> nn.Module:
    """Return a network that shares the tensors of ``base`` and has the chosen adapter at each site.

    Args:
        base: a network whose stages share their tensors.
        stage_map: the positions of its stages.
        choice: the adapters of each stage.
        outside: parameters outside the stages that replace the base's, by name.
        repeats_last: run the last stage in calls of a looped module beyond the stages.
    """
    replaced = {id(base.get_parameter(name)): value for name, value in (outside or {}).items()}
    network = copy_network(base, share_tensors=True, replaced=replaced)
    copies: list[tuple[nn.Module, nn.Module]] = []
    looped: dict[str, list[nn.Module]] = {}
    for group in stage_map.groups:
        copies += separate_stages(network, group)
        for site in group.sites:
            module = network.get_submodule(site.module)
            if site.call is not None:
                original, module = module, copy_network(module, share_tensors=True)
                copies += zip(original.modules(), module.modules())
                looped.setdefault(site.module, []).append(module)
            _install(module, group, choice[site.stage][group.name], site.stage)
    for name, calls in looped.items():
        tell_calls_apart(network.get_submodule(name), name, calls, repeats_last)
    if looped:
        count_calls(network)
    if copies:
        vars(network)[COPIES] = copies
    return network


def _install(module: nn.Module, group: Group, adapter: StageAdapter, stage: int) -> None:
    terms, private = terms_of(adapter), private_tensors(adapter)
    for spec in group.tensors:
        if spec.name in terms:
            places = {owner_of(module, alias): alias for alias in spec.aliases}  # one entry if a module has two names
            for alias in places.values():
                path, _, attribute = alias.rpartition(".")
                owner, term = module.get_submodule(path), _beside(terms[spec.name])
                add_term(owner, attribute, term, without_base=spec.without_base, stage=stage)
        elif spec.name in private:
            put_tensor(module, spec, private[spec.name])


def _beside(term: Term) -> Term:
    """Another module with the tensors of a term: torch.func restores a module wrongly that has two places."""
    result = term.__new__(type(term))
    vars(result).update({key: item.copy() if isinstance(item, dict) else item for key, item in vars(term).items()})
    return result


def merge(
    base: nn.Module, stage_map: StageMap, choices: Sequence[Choice], outside: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """Return a network of the original class with merged, dense tensors.

    Args:
        base: a network whose stages share their tensors.
        stage_map: the positions of its stages.
        choices: the adapters to merge; with several, their updates are summed.
        outside: parameters outside the stages that replace the base's, by name.

    Raises:
        LoRunError: one module stands for several stages whose merged tensors differ.
    """
    own = {name: nn.Parameter(value.detach().clone(), False) for name, value in (outside or {}).items()}
    network = copy_network(base, replaced={id(base.get_parameter(name)): value for name, value in own.items()})
    written: dict[tuple[int, str], Tensor] = {}
    for group in stage_map.groups:
        for site in group.sites:
            module, denoiser = network.get_submodule(site.module), base.get_submodule(site.module)
            dense = [dense_tensors(denoiser, group, choice[site.stage][group.name]) for choice in choices]
            for spec in group.tensors:
                if spec.common:
                    continue
                value = dense[0][spec.name]
                if len(dense) > 1:
                    values = [tensors[spec.name] for tensors in dense]
                    value = weighted_sum_of_tensors(
                        tensor_of(denoiser, spec.name), values, [1.0] * len(dense), spec.name
                    )
                place = owner_of(module, spec.name)
                if place in written and not torch.equal(written[place], value):
                    raise LoRunError(
                        f"cannot merge {site}: {stage_map.network} has one module for several stages, which differ "
                        "after training; keep the LoRunModel and save it with save_pretrained"
                    )
                written[place] = value
                put_tensor(module, spec, value.clone())
    return network


def put_tensor(module: nn.Module, spec: TensorSpec, value: Tensor) -> None:
    """Give a denoiser this tensor, under all names of ``spec``; a plain tensor in a parameter's place is frozen."""
    if not spec.buffer and not isinstance(value, nn.Parameter):
        value = nn.Parameter(value, requires_grad=False)
    for alias in spec.aliases:
        path, _, attribute = alias.rpartition(".")
        setattr(module.get_submodule(path), attribute, value)

"""Build networks whose stages share one base: the bare base, a network with adapters, a merged one.

A network that runs is a copy of the bare base that shares all of its tensors. Its stages read
their tensors through the adapters' low-rank terms. Copies are cheap, so that a swap of adapters
can be a new network put in the place of the old one, and a forward that runs meanwhile ends on
the network it began with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import LoRunError
from ..stages.stage_map import Group, Site, StageMap, TensorSpec
from ..util.modules import copy_network, owner_of, tensor_of
from .adapted import add_term
from .adapter import StageAdapter, lowrank_terms, private_tensors
from .calls import tell_calls_apart

COPIES = (
    "lorun_copies"  # of a network, those of its modules that run, in some stage, as a copy: with each of the copies
)


Choice = Mapping[tuple[str, Site], StageAdapter]  # (group's name, site) -> its adapter


def share(network: nn.Module, group: Group, values: Mapping[str, Tensor]) -> None:
    """Give all sites of ``group`` in ``network`` one storage for each tensor, holding ``values``."""
    modules = [network.get_submodule(site.module) for site in group.sites]
    for spec in group.tensors:
        if spec.common:
            continue
        first = tensor_of(modules[0], spec.name)
        value = values[spec.name].to(first).contiguous()  # means of transposed views are not
        base = value if spec.buffer else nn.Parameter(value, requires_grad=False)
        for module in modules:
            _put(module, spec, base)


def assemble(
    base: nn.Module, stage_map: StageMap, choice: Choice, outside: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A network that shares the tensors of ``base``, with the adapter of each site in place.

    ``outside``: parameters to take the place of the base's, by name.
    """
    network = copy_network(base, share_tensors=True)
    replace_parameters(network, outside or {})
    copies: list[tuple[nn.Module, nn.Module]] = []
    for group in stage_map.groups:
        _separate(network, group, copies)
        looped: dict[str, list[nn.Module]] = {}
        for site in group.sites:
            module = network.get_submodule(site.module)
            if site.call is not None:
                original, module = module, copy_network(module, share_tensors=True)
                copies += zip(original.modules(), module.modules())
                looped.setdefault(site.module, []).append(module)
            _install(module, group, choice[group.name, site])
        for name, copies in looped.items():
            tell_calls_apart(network.get_submodule(name), name, copies)
    if copies:
        vars(network)[COPIES] = copies
    return network


def replace_parameters(network: nn.Module, others: Mapping[str, Tensor]) -> None:
    """Put others in the place of parameters, wherever the network holds these."""
    old = {id(network.get_parameter(name)): value for name, value in others.items()}
    for module in network.modules() if old else ():
        for name, tensor in list(module._parameters.items()):
            if id(tensor) in old:
                setattr(module, name, old[id(tensor)])


def _install(module: nn.Module, group: Group, adapter: StageAdapter) -> None:
    terms, private = lowrank_terms(adapter), private_tensors(adapter)
    for spec in group.tensors:
        if spec.name in terms:
            places = {owner_of(module, alias): alias for alias in spec.aliases}  # a module may have two names
            for alias in places.values():
                path, _, attribute = alias.rpartition(".")
                add_term(module.get_submodule(path), attribute, terms[spec.name])
        elif spec.name in private:
            _put(module, spec, private[spec.name])


def _separate(network: nn.Module, group: Group, copies: list[tuple[nn.Module, nn.Module]]) -> None:
    """Give each site modules of its own where several sites hold the same module object.

    ``copies``: takes each such module together with its copy.
    """
    owned: dict[int, Site | None] = _shared_with_the_outside(network, group)
    for site in group.sites:
        if site.call is not None:
            continue
        memo: dict[int, object] = {}
        parent, _, attribute = site.module.rpartition(".")
        pending = [(network.get_submodule(parent), attribute)]
        seen: set[int] = set()
        while pending:
            holder, name = pending.pop()
            child = holder._modules[name]
            if child is None:
                continue
            if owned.setdefault(id(child), site) is not site:
                original, child = child, copy_network(child, share_tensors=True, memo=memo)
                holder._modules[name] = child
                copies += zip(original.modules(), child.modules())
                owned[id(child)] = site
            if id(child) not in seen:
                seen.add(id(child))
                pending += [(child, grandchild) for grandchild in child._modules]


def _shared_with_the_outside(network: nn.Module, group: Group) -> dict[int, None]:
    """Modules that several sites hold and that the network uses elsewhere too, where they stay the base's."""
    sites = {id(network.get_submodule(site.module)) for site in group.sites if site.call is None}
    holders: dict[int, int] = {}
    for site in dict.fromkeys(site.module for site in group.sites if site.call is None):
        for module in network.get_submodule(site).modules():
            holders[id(module)] = holders.get(id(module), 0) + 1
    outside: set[int] = set()
    pending = [network]
    while pending:
        module = pending.pop()
        if id(module) not in outside and id(module) not in sites:
            outside.add(id(module))
            pending += [child for child in module.children() if child is not None]
    return {module: None for module in outside if holders.get(module, 0) > 1}


def merge(
    base: nn.Module, stage_map: StageMap, choice: Choice, outside: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A network of the original class with dense tensors of its own; ``outside`` as in :func:`assemble`.

    Raises:
        LoRunError: a module that stands for several stages has been trained apart.
    """
    network = copy_network(base)
    own = {name: nn.Parameter(value.detach().clone(), False) for name, value in (outside or {}).items()}
    replace_parameters(network, own)
    written: dict[tuple[int, str], Tensor] = {}
    for group in stage_map.groups:
        for site in group.sites:
            module, adapter = network.get_submodule(site.module), choice[group.name, site]
            dense = dense_tensors(base.get_submodule(site.module), group, adapter)
            for spec in group.tensors:
                if spec.common:
                    continue
                place = owner_of(module, spec.name)
                if place in written and not torch.equal(written[place], dense[spec.name]):
                    raise LoRunError(
                        f"expected equal stages in {site}, found different ones since its adapters were trained: "
                        f"{stage_map.network} has one module for them all, so keep the LoRunModel and save it with "
                        "save_pretrained"
                    )
                written[place] = dense[spec.name]
                value = dense[spec.name].clone()
                _put(module, spec, value if spec.buffer else nn.Parameter(value, requires_grad=False))
    return network


def dense_tensors(denoiser: nn.Module, group: Group, adapter: StageAdapter) -> dict[str, Tensor]:
    """What a stage's tensors amount to, from the base ``denoiser`` and the stage's adapter."""
    terms, private = lowrank_terms(adapter), private_tensors(adapter)
    with torch.no_grad():
        return {
            spec.name: private[spec.name].detach()
            if spec.name in private
            else terms[spec.name](tensor_of(denoiser, spec.name)).detach()
            for spec in group.tensors
            if not spec.common
        }


def _put(module: nn.Module, spec: TensorSpec, value: Tensor) -> None:
    for alias in spec.aliases:
        path, _, attribute = alias.rpartition(".")
        setattr(module.get_submodule(path), attribute, value)

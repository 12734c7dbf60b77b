"""Give each stage its own copy of modules that several stages share; the copies share the tensors."""

from __future__ import annotations

from torch import nn

from ..stages.stage_map import Group, Site
from ..util.copying import copy_network

COPIES = "lorun_copies"  # attribute of a network: pairs of a module and its copy in some stage


def separate_stages(network: nn.Module, group: Group) -> list[tuple[nn.Module, nn.Module]]:
    """Give each site its own module objects where several sites hold the same one.

    Returns:
        Pairs of a module and its copy.
    """
    copies: list[tuple[nn.Module, nn.Module]] = []
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
    return copies


def _shared_with_the_outside(network: nn.Module, group: Group) -> dict[int, Site | None]:
    """Return the modules that several sites hold and that the network also uses outside them.

    Outside the sites the original module must stay, so each site gets a copy.
    """
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
